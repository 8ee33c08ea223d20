"""The prefix cache: what was computed for a prompt's beginning serves every later prompt that begins alike."""

from finback.engine.blocks import BLOCK, BlockPool, child_key, root_key
from finback.engine.cache import PagedCache
from finback.engine.disk_cache import DiskCache
from finback.engine.request import Request


class PrefixCache:
    """Finds and publishes full blocks by their keys: in memory, and on disk where a folder is given."""

    def __init__(self, pool: BlockPool, cache: PagedCache, disk: DiskCache | None, enabled: bool = True) -> None:
        self.pool, self.cache, self.disk, self.enabled = pool, cache, disk, enabled

    def enter(self, request: Request) -> None:
        """Give a request the blocks that its ids begin with; its last token is always left to be computed."""
        key = root_key(request.wishes.tenant)
        while self.enabled and not request.wishes.needs_whole_prompt:
            start = len(request.blocks) * BLOCK
            ids = request.ids[start : start + BLOCK]
            if len(ids) < BLOCK:
                break
            key = child_key(key, ids)
            block = self._find(key)
            if block is None:
                break
            request.blocks.append(block)
            request.keys.append(key)
        request.cached = min(len(request.blocks) * BLOCK, len(request.ids) - 1)
        if request.hits is None:
            request.hits = request.cached

    def publish(self, request: Request) -> None:
        """Let others find the blocks that a request has filled."""
        if not self.enabled:
            return
        for index in range(len(request.keys), request.cached // BLOCK):
            key = request.keys[-1] if request.keys else root_key(request.wishes.tenant)
            key = child_key(key, request.ids[index * BLOCK : (index + 1) * BLOCK])
            request.keys.append(key)
            self.pool.publish(request.blocks[index], key)

    def keep(self, request: Request) -> None:
        """Copy the blocks of a request that ends to disk."""
        if self.disk is not None:
            for key, block in zip(request.keys, request.blocks, strict=False):
                if key not in self.disk and not self.disk.put(key, self.cache.payload(block)):
                    return  # the disk is behind; what follows would be dropped too

    def _find(self, key: bytes) -> int | None:
        block = self.pool.find(key)
        if block is not None:
            self.pool.share(block)
            return block
        payload = None if self.disk is None else self.disk.get(key)
        if payload is None or (block := self.pool.take()) is None:
            return None
        self.cache.load(block, payload)
        self.pool.publish(block, key)
        return block
