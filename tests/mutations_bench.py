"""Planted bugs of the load generator, the roofline and `finback bench`."""

from mutations import Mutation

SPEED, ROOFLINE, CLI, SIZES = "evaluate/speed.py", "evaluate/roofline.py", "cli_bench.py", "model/sizes.py"
LIMITS, CALLS, DOCTOR = "evaluate/limits.py", "evaluate/calls.py", "doctor.py"
TEST_LIMITS, TEST_DOCTOR = "test_evaluate_limits.py", "test_doctor.py"
TEST_SPEED, TEST_ROOFLINE, TEST_CLI = "test_evaluate_speed.py", "test_evaluate_roofline.py", "test_cli_bench.py"

MUTATIONS = [
    Mutation(
        SPEED,
        "ordered[-(-q * len(ordered) // 100) - 1]",
        "ordered[q * len(ordered) // 100 - 1]",
        [f"{TEST_SPEED}::test_percentiles_are_the_least_values_that_enough_do_not_exceed"],
        "percentiles of few requests are too low",
    ),
    Mutation(
        SPEED,
        "len(self.flying) < concurrency",
        "len(self.flying) <= concurrency",
        [f"{TEST_SPEED}::test_a_closed_loop_keeps_as_many_in_flight_as_it_says_and_all_finish"],
        "a closed loop has one request more in flight than it says",
    ),
    Mutation(
        SPEED,
        "self._send(*queue.popleft())",
        "self._send(queue.popleft()[0], self._now())",
        [f"{TEST_SPEED}::test_an_open_loop_counts_from_when_a_request_was_due"],
        "an open loop hides what a request waited for a long step",
    ),
    Mutation(
        SPEED,
        "times[-1] + draw.expovariate(self.rate)",
        "times[-1] + draw.uniform(0, 2 / self.rate)",
        [f"{TEST_SPEED}::test_arrivals_are_a_poisson_process_of_the_rate"],
        "arrivals keep the mean rate and never come in bursts",
    ),
    Mutation(
        SPEED,
        "record.token_times += [now] * new",
        "record.token_times += [now] * min(new, 1)",
        [f"{TEST_SPEED}::test_tokens_of_one_step_have_gaps_of_zero"],
        "tokens that speculation won are not counted",
    ),
    Mutation(
        SPEED,
        "shared + _ids(draw, length - len(shared), vocab_size)",
        "_ids(draw, length, vocab_size)",
        [f"{TEST_SPEED}::test_a_shared_beginning_is_found_from_the_first_counted_request_on"],
        "--shared-tokens does nothing",
    ),
    Mutation(
        SPEED,
        'load.prompts(vocab_size, together, "warm-up")',
        "load.prompts(vocab_size, together)",
        [f"{TEST_SPEED}::test_a_shared_beginning_is_found_from_the_first_counted_request_on"],
        "the warm-up leaves the measured prompts in the cache",
    ),
    Mutation(
        SPEED,
        "max(record.token_times[-1] for record in done) - began",
        "clock.now() - warm.start",
        [f"{TEST_SPEED}::test_times_of_a_closed_loop_of_one_without_its_warm_up"],
        "the warm-up counts",
    ),
    Mutation(
        SPEED,
        "if decodes and len(moved) == rows:",
        "if True:",
        [f"{TEST_SPEED}::test_steps_that_compute_prompts_are_no_decoding_steps"],
        "steps that compute prompts count as decoding",
    ),
    Mutation(
        SIZES,
        "routed = count.routed_experts * (1 - (1 - chosen) ** rows)",
        "routed = count.routed_experts * min(1.0, chosen * rows)",
        [f"{TEST_ROOFLINE}::test_bytes_read_are_those_of_the_tensors_that_rows_need"],
        "rows are taken to choose experts that no other chooses",
    ),
    Mutation(
        SIZES,
        "plain * dtype_bytes + count.router * 4 + count.embedding * head_bytes",
        "plain * dtype_bytes + count.router * 4 + count.head * head_bytes",
        [f"{TEST_ROOFLINE}::test_bytes_read_are_those_of_the_tensors_that_rows_need"],
        "a tied head is read for nothing",
    ),
    Mutation(
        ROOFLINE,
        "step.tokens / step.rows * needs",
        "needs",
        [f"{TEST_ROOFLINE}::test_speculation_is_held_to_the_limit_without_it"],
        "speculation brings nothing in the share",
    ),
    Mutation(
        ROOFLINE,
        "blocks = model.decoder.layers.modules()",
        "blocks = model.decoder.lm_head.modules()",
        [f"{TEST_ROOFLINE}::test_needs_are_the_models"],
        "int4 weights count as the int8 of their head",
    ),
    Mutation(
        CLI,
        "engine = Engine(loaded, max_batch=load.concurrency or max_batch, options=options)",
        "engine = Engine(loaded, max_batch=load.concurrency or max_batch)",
        [f"{TEST_CLI}::test_options_reach_the_engine"],
        "--speculate and --cache-format do nothing",
    ),
    Mutation(
        ROOFLINE,
        "isinstance(module, Weight) and module.form is not None",
        "type(module).__name__ == 'PackedWeight'",
        [f"{TEST_ROOFLINE}::test_needs_of_weights_in_panels_are_those_of_their_numbers"],
        "weights laid out for native kernels count as bfloat16: int8 looks twice as fast as memory allows",
    ),
    Mutation(
        LIMITS,
        "return max(self.read.best, self.gemv_bf16.best)",
        "return self.gemv_bf16.best",
        [f"{TEST_LIMITS}::test_the_limit_is_the_best_that_can_hold_the_numbers"],
        "a slow product hides how much faster memory is",
    ),
    Mutation(
        LIMITS,
        "kinds = KINDS[: KINDS.index(kind) + 1]",
        "kinds = (kind,)",
        [f"{TEST_LIMITS}::test_the_limit_is_the_best_that_can_hold_the_numbers"],
        "int8 is held to a lower limit than bfloat16 where tiles multiply that alone",
    ),
    Mutation(
        LIMITS,
        "return memory.fill_(_FILL)",
        "return memory",
        [f"{TEST_LIMITS}::test_the_memory_is_a_matrix_of_every_form"],
        "all that is read is one page of zeros, and memory looks as fast as a cache",
    ),
    Mutation(
        CALLS,
        'limits.product("bf16" if name == "fp8" else name)',
        'limits.product("bf16")',
        [f"{TEST_LIMITS}::test_integers_are_held_to_the_products_of_integers"],
        "int8 seems to use more of the machine than it does",
    ),
    Mutation(
        CALLS,
        "2 * rows * out * x.shape[1]",
        "rows * out * x.shape[1]",
        [f"{TEST_LIMITS}::test_the_work_of_a_call"],
        "every share of the products is half of what it is",
    ),
    Mutation(
        CLI,
        "        return _check_alone(context)",
        "        return",
        [f"{TEST_CLI}::test_a_mistake_about_the_machine_is_refused"],
        "options before `machine` do nothing, silently",
    ),
    Mutation(
        DOCTOR,
        "    elif runs != there[0]:",
        "    elif runs == 'torch':",
        [f"{TEST_DOCTOR}::test_a_lower_path_that_is_forced_is_named"],
        "a path forced long ago keeps the machine slow, and nobody is told",
    ),
    Mutation(
        DOCTOR,
        "    better = missing[: possible.index(there[0])]",
        "    better = missing",
        [f"{TEST_DOCTOR}::test_only_what_is_better_than_the_path_that_runs_is_missed"],
        "a compiler is asked for that would bring nothing",
    ),
    Mutation(
        "kernels/native.py",
        '        except ModuleNotFoundError:\n            found[each] = "not built"\n',
        "",
        [f"{TEST_DOCTOR}::test_kernels_that_were_not_built_say_how_to_build_them"],
        "what was never built is said to be damaged",
    ),
]
