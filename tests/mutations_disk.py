"""Planted bugs of experts that stay on disk."""

from mutations import Mutation

DISK, KERNEL, READER, SIZES = "weights/disk.py", "kernels/experts.py", "weights/reader.py", "model/sizes.py"
TEST = "test_weights_disk.py"
LRU = f"{TEST}::test_the_budget_holds_and_the_least_recently_used_leaves"

MUTATIONS = [
    Mutation(DISK, "popitem(last=False)", "popitem(last=True)", [LRU], "the expert just used leaves, the oldest stays"),
    Mutation(
        DISK,
        "self._entries.move_to_end((layer, expert))",
        "pass",
        [LRU],
        "the first to come leaves, however hot",
    ),
    Mutation(
        DISK,
        "while self.resident_bytes + self._sizes[layer] > self.budget:",
        "while self.resident_bytes > self.budget:",
        [LRU],
        "memory is an expert above the budget",
    ),
    Mutation(
        DISK,
        "self.resident_bytes -= self._sizes[old_layer]",
        "self.resident_bytes -= self._sizes[old_layer]; spare = None",
        [f"{TEST}::test_buffers_are_reused"],
        "every miss touches fresh pages, which costs more than reading",
    ),
    Mutation(
        DISK,
        'counted=self.stack == "gate_up"',
        "counted=True",
        [f"{TEST}::test_uses_are_counted_once_a_layer_and_pass"],
        "half of all uses are hits that never were",
    ),
    Mutation(
        DISK,
        "if _stamp(self._root / file) != self._stamps[file]:",
        "if False:",
        [f"{TEST}::test_a_file_that_changes_meanwhile_is_named"],
        "experts of another model answer",
    ),
    Mutation(
        DISK,
        "except (OSError, ValueError) as error:",
        "except OSError as error:",
        [f"{TEST}::test_a_gguf_file_is_read_an_expert_at_a_time"],
        "a file cut off is a traceback",
    ),
    Mutation(
        DISK,
        "if x.requires_grad and torch.is_grad_enabled():",
        "if False:",
        [f"{TEST}::test_such_a_model_is_not_trained"],
        "gradients are of experts that were overwritten",
    ),
    Mutation(
        DISK,
        'layout.matrices(f"{layer}.{name}", one, expert)',
        'layout.matrices(f"{layer}.{name}", one)',
        [f"{TEST}::test_every_budget_gives_the_resident_models_logits"],
        "every expert is the first one",
    ),
    Mutation(
        DISK,
        "            self._entries[layer, expert] = entry\n            self._entries.move_to_end((layer, expert))\n"
        "            yield entry",
        "            self._entries[layer, expert] = entry\n            self._entries.move_to_end((layer, expert))\n"
        "        yield entry",
        [f"{TEST}::test_nobody_reads_into_an_expert_in_use"],
        "another thread reads into the expert that is being multiplied",
    ),
    Mutation(
        KERNEL,
        "part = torch.mul(F.silu(gate), up, out=active[rows])",
        "part = torch.mul(F.silu(up), gate, out=active[rows])",
        [f"{TEST}::test_streamed_experts_are_the_kernels"],
        "gate and up are exchanged where experts are on disk",
    ),
    Mutation(
        READER,
        "hot.connect(written)",
        "pass",
        [f"{TEST}::test_a_missing_pack_is_written_an_expert_at_a_time"],
        "every miss quantises again",
    ),
    Mutation(
        SIZES,
        "(count.routed_experts + _mtp_experts(config)) * packed",
        "count.routed_experts * packed",
        [f"{TEST}::test_room_is_asked_for_what_is_in_memory"],
        "the estimate forgets that MTP's experts stay on disk too",
    ),
]
