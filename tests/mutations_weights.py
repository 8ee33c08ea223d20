"""Planted bugs of the weights room."""

from mutations import Mutation

LAYOUT, STORE, READER, WRITER = "weights/layout.py", "weights/store.py", "weights/reader.py", "weights/writer.py"
QUANTISE, WEIGHT, PACKS = "kernels/quantise.py", "model/weight.py", "weights/packs.py"
TEST_FOLDER, TEST_ERRORS = "test_weights_folder.py", "test_weights_errors.py"
PACKED, TIED, LOAD = "test_weights_packed.py", "test_weights_tied.py", "test_weights_load.py"

MUTATIONS = [
    Mutation(
        LAYOUT,
        '("gate", "up")',
        '("up", "gate")',
        [f"{TEST_FOLDER}::test_gate_and_up_are_not_exchanged", f"{TEST_FOLDER}::test_what_we_write_transformers_reads"],
        "gate and up are exchanged on disk, which a round trip cannot see",
    ),
    Mutation(
        LAYOUT,
        '"shared_head.norm."',
        '"norm."',
        [f"{TEST_FOLDER}::test_names_and_shapes_on_disk_are_the_originals"],
        "the MTP norm has a name nobody knows",
    ),
    Mutation(
        LAYOUT,
        'twins += [f"model.layers.{layer}.shared_head.head.weight" for layer in model.mtp]',
        "pass",
        [f"{TEST_FOLDER}::test_the_mtp_layer_repeats_embedding_and_head"],
        "the MTP layer lacks the head that other loaders read",
    ),
    Mutation(
        STORE,
        'metadata={"format": "pt"}',
        "metadata=None",
        [f"{TEST_FOLDER}::test_the_folder_is_complete"],
        "transformers refuses the file",
    ),
    Mutation(
        STORE,
        "if shard and size + tensor.nbytes > limit:",
        "if shard and size > limit:",
        [f"{TEST_FOLDER}::test_shards_stay_below_the_limit_and_are_indexed"],
        "shards grow past the limit",
    ),
    Mutation(
        STORE,
        "not isinstance(file, str) or Path(file).name != file",
        "not isinstance(file, str)",
        [f"{TEST_ERRORS}::test_an_index_may_name_files_of_its_folder_only"],
        "an index reads files anywhere",
    ),
    Mutation(
        STORE,
        "if name not in held[file]:",
        "if False:",
        [f"{TEST_ERRORS}::test_an_index_that_misplaces_a_tensor"],
        "a wrong index is a crash in the middle of loading",
    ),
    Mutation(
        READER,
        "if source.shape(part) != shape:",
        "if len(source.shape(part)) != len(shape):",
        [f"{TEST_ERRORS}::test_a_wrong_shape_is_named_with_both_shapes"],
        "a wrong shape is a crash, or silently broadcast",
    ),
    Mutation(
        READER,
        "if missing := expected.keys() - names:",
        "if missing := set():",
        [f"{TEST_ERRORS}::test_a_missing_tensor_is_named"],
        "a missing tensor is not named",
    ),
    Mutation(
        READER,
        "torch.float32 if isinstance(module, Router) else dtype",
        "dtype",
        [f"{TEST_FOLDER}::test_auto_keeps_the_checkpoints_dtype"],
        "the router's weight becomes bf16",
    ),
    Mutation(
        READER,
        "if id(parameter) not in made:",
        "if True:",
        [f"{TEST_FOLDER}::test_a_loaded_model_is_ready"],
        "a tied head comes apart on loading",
    ),
    Mutation(
        READER,
        "num_nextn_predict_layers=0)",
        "num_nextn_predict_layers=1)",
        [f"{TEST_FOLDER}::test_what_transformers_writes_we_read"],
        "files without their announced MTP layer are refused",
    ),
    Mutation(
        READER,
        "    model.eval()\n",
        "",
        [f"{TEST_FOLDER}::test_a_loaded_model_is_ready"],
        "a loaded model counts load and keeps balance losses",
    ),
    Mutation(
        WRITER,
        "dataclasses.replace(config, rope_scaling=config.active_scaling)",
        "config",
        [f"{TEST_FOLDER}::test_what_we_write_transformers_reads"],
        "other readers apply a YaRN that the model does not",
    ),
    Mutation(
        WRITER,
        '"model*.safetensors", store.INDEX',
        '"model.safetensors"',
        [f"{TEST_FOLDER}::test_saving_again_replaces_what_was_and_keeps_the_rest"],
        "shards and index of the old model stay",
    ),
    Mutation(
        WRITER,
        "patterns(folder, names) if Path(folder) == target else set()",
        "patterns(folder, names)",
        [f"{TEST_FOLDER}::test_saving_again_replaces_what_was_and_keeps_the_rest"],
        "files in subfolders of a model are lost",
    ),
    Mutation(QUANTISE, "bitwise_and_(-0x7810)", "bitwise_and_(0x7F0)", [PACKED], "FP8 codes lose their sign"),
    Mutation(QUANTISE, ".mul_(2.0**120)", ".mul_(2.0**119)", [PACKED], "FP8 codes are read as half of what they are"),
    Mutation(
        QUANTISE,
        "slice(rows.start // self.row_block, -(-rows.stop // self.row_block))",
        "slice(rows.start // self.row_block, rows.stop // self.row_block)",
        [PACKED],
        "the ragged last rows lose their scale",
    ),
    Mutation(
        QUANTISE, "scale.log2().ceil()", "scale.log2().round()", [PACKED], "power-of-two scales overflow the codes"
    ),
    Mutation(
        QUANTISE, "grouped & 15, grouped >> 4", "grouped >> 4, grouped & 15", [PACKED], "int4 halves are exchanged"
    ),
    Mutation(
        QUANTISE, "better = error < best_error", "better = error > best_error", [PACKED], "the worst int4 scale wins"
    ),
    Mutation(WEIGHT, "outs, dim=-1", "outs[:1] * len(outs), dim=-1", [PACKED], "every panel is the first one"),
    Mutation(
        WEIGHT,
        "for part in range(self.parts)]",
        "for part in reversed(range(self.parts))]",
        [PACKED],
        "packed gate and up are exchanged",
    ),
    Mutation(
        STORE,
        "part.view(torch.uint8) & 127).eq(127)",
        "part.view(torch.uint8) & 127).eq(128)",
        [f"{TEST_ERRORS}::test_a_nan_code_in_fp8_is_named"],
        "NaN in an FP8 file is read as 480",
    ),
    Mutation(
        STORE,
        "bad = doubtful and not part.isfinite().all()",
        "bad = doubtful",
        [f"{TEST_ERRORS}::test_large_numbers_are_not_mistaken_for_infinity"],
        "large weights are called NaN",
    ),
    Mutation(
        STORE,
        "not part.sum(dtype=wide).isfinite()",
        "False",
        [f"{TEST_ERRORS}::test_a_number_that_is_none_is_named"],
        "NaN weights load and give NaN answers",
    ),
    Mutation(
        PACKS,
        "if read_json(kept / _STAMP) != _stamp(model):",
        "if False:",
        [f"{PACKED}::test_quantised_loading_is_kept_beside_the_model_and_reused"],
        "a pack of other weights is read",
    ),
    Mutation(
        LAYOUT,
        'or name.endswith(".eh_proj.weight")',
        "",
        [f"{PACKED}::test_an_fp8_folder_is_what_deepseek_publishes"],
        "eh_proj is written in FP8, which nobody reads",
    ),
    Mutation(
        READER,
        'if form != "fp8" and head.weight.form is None:',
        "if False:",
        [f"{TIED}::test_the_head_is_int8_and_the_embedding_what_it_was"],
        "a tied head of a small model is most of what a quantised token reads",
    ),
    Mutation(
        LAYOUT,
        "return self.name if whole or not self.twin else self.twin",
        "return self.name if self.name in names or not self.twin else self.twin",
        [f"{TIED}::test_a_head_in_the_file_is_not_looked_at"],
        "a tied model multiplies by another table than its own",
    ),
    Mutation(
        LAYOUT,
        "head = embedding if tied else model.decoder.lm_head.weight.dense()",
        "head = model.decoder.lm_head.weight.dense()",
        [f"{TIED}::test_saving_gives_the_embedding_back"],
        "a tied file is written with two different tables",
    ),
    Mutation(
        "model/sizes.py",
        'form in (None, "fp8") and not laid_out:',
        'form in (None, "fp8"):',
        ["test_weights_hostile.py::test_the_estimate_counts_what_the_model_takes"],
        "a tied head in panels is not counted: the model is let in and has no room",
    ),
    Mutation(
        READER,
        "        make_room(model)\n",
        "        pass\n",
        [f"{LOAD}::test_loading_takes_the_weights_and_little_more"],
        "a model that just fits is read into plain tensors first, and has no room for its panels",
    ),
    Mutation(
        READER,
        "if buffer.is_meta:",
        "if True:",
        [f"{LOAD}::test_panels_hold_what_plain_tensors_do"],
        "panels become zeros of ordinary memory",
    ),
    Mutation(
        LAYOUT,
        "source.rows(self.name + form.suffix, scales.start, scales.stop)",
        "source.rows(self.name + form.suffix, 0, scales.stop - scales.start)",
        [f"{LOAD}::test_panels_hold_what_plain_tensors_do"],
        "all rows of a pack have the scales of the first ones",
    ),
    Mutation(
        "kernels/native.py",
        "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS",
        "flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS",
        [f"{LOAD}::test_panels_may_lie_in_huge_pages"],
        "weights never lie in huge pages, and reading them is slower, which nothing says",
    ),
]
