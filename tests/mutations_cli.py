"""Planted bugs of the commands, the terminal and the scores."""

from mutations import Mutation

ACCURACY, TERMINAL, ABOUT, CLI = "evaluate/accuracy.py", "terminal.py", "about.py", "cli.py"
TEST_ACCURACY, TEST_TERMINAL, TEST_CLI = "test_evaluate_accuracy.py", "test_cli_terminal.py", "test_cli_commands.py"

MUTATIONS = [
    Mutation(
        ACCURACY,
        "z2 / (4 * n * n))",
        "z2 / (4 * n))",
        [f"{TEST_ACCURACY}::test_wilson_bounds_solve_their_equation"],
        "the interval is not Wilson's",
    ),
    Mutation(
        ACCURACY,
        "problem = problems[completion.index]",
        "problem = problems[sum(entry is not None for entry in graded)]",
        [f"{TEST_ACCURACY}::test_scores_count_right_answers_per_task"],
        "answers are graded in the order they finish",
    ),
    Mutation(
        ACCURACY,
        'split="held_out"',
        'split="train"',
        [f"{TEST_ACCURACY}::test_problems_are_held_out_asked_as_a_user_asks_and_fixed_by_the_seed"],
        "models are measured on what they were trained on",
    ),
    Mutation(
        TERMINAL,
        "text = text.translate(_CONTROLS)",
        "pass",
        [f"{TEST_TERMINAL}::test_a_model_cannot_send_commands_to_the_terminal"],
        "thinking can send escape sequences to the terminal",
    ),
    Mutation(
        TERMINAL,
        'note("Stopped.")',
        "sys.exit(130)",
        [f"{TEST_TERMINAL}::test_ctrl_c_stops_the_answer_and_not_the_program"],
        "Ctrl-C ends the program",
    ),
    Mutation(
        TERMINAL,
        "        messages.pop()\n",
        "",
        [
            f"{TEST_TERMINAL}::test_a_turn_without_an_answer_is_not_kept",
            f"{TEST_TERMINAL}::test_a_full_context_is_said_and_the_conversation_stays_whole",
        ],
        "two turns of the user stand one after the other",
    ),
    Mutation(
        ABOUT,
        '"parameters_active": count.active,',
        '"parameters_active": count.total,',
        [f"{TEST_CLI}::test_show_counts_deepseek_v3"],
        "active parameters are all parameters",
    ),
    Mutation(
        ABOUT,
        'if not settings.get("do_sample"):',
        "if not settings:",
        [f"{TEST_CLI}::test_ask_samples_as_the_model_says_unless_told_otherwise"],
        "a greedy model is sampled",
    ),
    Mutation(
        CLI,
        "raise typer.Exit(2) from error",
        "raise typer.Exit(1) from error",
        [f"{TEST_CLI}::test_a_mistake_is_one_line_and_exit_code_2"],
        "a mistake has the exit code of a crash",
    ),
    Mutation(
        CLI,
        "for name, value in asked.items() if value is not None}",
        "for name, value in asked.items() if value}",
        [f"{TEST_CLI}::test_ask_samples_as_the_model_says_unless_told_otherwise"],
        "--temperature 0 is ignored",
    ),
]
