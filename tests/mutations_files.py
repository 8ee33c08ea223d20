"""Planted bugs of the readers of files that anyone may have made: GGUF, lying headers, pickles."""

from mutations import Mutation

GGUF, KEYS, STORE, READER = "weights/gguf_file.py", "weights/gguf_keys.py", "weights/store.py", "weights/reader.py"
PATHS = "paths.py"
CONVERT, UNPICKLE, SIZES, CONFIG = "weights/convert.py", "weights/unpickle.py", "model/sizes.py", "model/config.py"
TEST_LIES = "test_weights_gguf_hostile.py"
TEST_GGUF, TEST_HOSTILE, TEST_CONVERT = "test_weights_gguf.py", "test_weights_hostile.py", "test_weights_convert.py"
PACKED = "test_weights_packed.py"
WRITTEN = [f"{TEST_GGUF}::test_what_we_write_in_bf16_is_the_model"]

MUTATIONS = [
    Mutation(
        GGUF,
        "(keys.transpose(1, 2), values)",
        "(values, keys.transpose(1, 2))",
        WRITTEN,
        "keys and values change places",
    ),
    Mutation(
        GGUF,
        "whole.unflatten(0, (heads, -1, 2))",
        "whole.unflatten(0, (heads, 2, -1))",
        WRITTEN,
        "Llama's halves are dealt out twice",
    ),
    Mutation(
        GGUF,
        'not in ("llama", "deepseek")',
        'not in ("llama",)',
        [f"{TEST_GGUF}::test_halves_are_dealt_out_as_llama_cpp_wants_them"],
        "deepseek-moe's halves stay as they are on one side",
    ),
    Mutation(GGUF, "(expert or 0) * shape[0] + start", "start", WRITTEN, "every expert is the first one"),
    Mutation(
        GGUF,
        'len(shape) == 1 or "ffn_gate_inp" in name',
        "len(shape) == 1",
        [f"{TEST_GGUF}::test_q8_0_is_what_the_library_makes_of_it"],
        "the router is quantised",
    ),
    Mutation(GGUF, "if not np.isfinite(", "if False and (", [f"{TEST_LIES}::test_nan_is_named"], "NaN is read"),
    Mutation(
        KEYS, "(8, 4)", "(1, 1)", [f"{TEST_GGUF}::test_the_groups_of_old_files"], "old V3 files lose their groups"
    ),
    Mutation(KEYS, "query - rope if both", "query if both", WRITTEN, "the nope part holds the rope part too"),
    Mutation(
        KEYS, "0.1 * scaling.mscale_all_dim", "scaling.mscale_all_dim", WRITTEN, "YaRN's magnitude is ten times itself"
    ),
    Mutation(KEYS, 'float(f"{value:.7g}")', "value", WRITTEN, "1e-6 comes back as 9.99999997e-07"),
    Mutation(
        STORE,
        "for path in folder.iterdir():",
        "for path in ():",
        [f"{TEST_HOSTILE}::test_a_link_out_of_the_folder_is_named"],
        "a link reads any file of the machine",
    ),
    Mutation(
        PATHS,
        "if path.stat().st_size > JSON_LIMIT:",
        "if False:",
        [f"{TEST_HOSTILE}::test_a_giant_json_is_not_read"],
        "a file of 3 GiB is parsed as JSON",
    ),
    Mutation(
        PATHS,
        '(OSError, ValueError, RecursionError) as error:\n        raise UserError(f"{path}: cannot',
        '(OSError, ValueError) as error:\n        raise UserError(f"{path}: cannot',
        [f"{TEST_HOSTILE}::test_deeply_nested_json_is_one_clear_line"],
        "nested JSON is a traceback",
    ),
    Mutation(
        READER,
        "if free is None or need.total <= free:",
        "if True:",
        [f"{TEST_HOSTILE}::test_a_model_that_has_no_room_is_refused_with_the_arithmetic"],
        "a model larger than memory takes the machine down",
    ),
    Mutation(
        SIZES,
        '"int4": 0.5 + 2 / 32',
        '"int4": 0.5',
        [f"{TEST_HOSTILE}::test_the_estimate_counts_what_the_model_takes"],
        "the estimate forgets int4's scales",
    ),
    Mutation(
        CONFIG,
        "value > limit",
        "False",
        ["test_families.py::test_what_the_family_does_not_do_is_one_clear_line"],
        "2^31 layers are built until memory ends",
    ),
    Mutation(
        UNPICKLE,
        "weights_only=True",
        "weights_only=False",
        [f"{TEST_CONVERT}::test_a_pickle_that_would_run_code_does_not"],
        "a pickle runs its code",
    ),
    Mutation(
        UNPICKLE,
        "    limit(files)\n",
        "",
        [f"{TEST_CONVERT}::test_the_limits_are_set_before_anything_is_read"],
        "the process that unpickles has no limits",
    ),
    Mutation(
        CONVERT,
        "problems.append(str(error))\n                tensors",
        "pass\n                tensors",
        [f"{TEST_CONVERT}::test_every_tensor_that_is_wrong_is_named"],
        "verify passes NaN",
    ),
    Mutation(
        CONVERT,
        "!= entry.sha256",
        "!= entry.sha256.lower() and False",
        [f"{TEST_CONVERT}::test_files_that_are_not_as_they_were_pulled_are_named"],
        "verify passes changed files",
    ),
    Mutation(
        "weights/layout.py",
        'source.dtype(self.name) == kinds[""].dtype',
        'source.dtype(self.name) == kinds[""].dtype and len(kinds) == 1',
        [f"{PACKED}::test_fp8_codes_are_never_rounded_again"],
        "FP8 codes are dequantised and rounded again",
    ),
    Mutation(
        KEYS,
        'return None if kind == "none" else {"type": kind}',
        "return None",
        [f"{TEST_LIES}::test_metadata_that_lies_is_one_clear_line"],
        "a context stretched in another way is not stretched",
    ),
    Mutation(
        CONFIG,
        "object.__setattr__(values, field.name, float(value))",
        "pass",
        [f"{TEST_GGUF}::test_numbers_have_the_types_that_readers_want"],
        "10000 is written as a whole number, which llama.cpp refuses",
    ),
    Mutation(
        KEYS,
        'for name in ("bos_token_id", "eos_token_id")',
        "for name in ()",
        [f"{TEST_GGUF}::test_what_we_write_in_bf16_is_the_model"],
        "the special tokens of a GGUF file are V3's",
    ),
]
