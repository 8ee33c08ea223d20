"""Planted bugs of what comes from a hub, and of the models on disk."""

from mutations import Mutation

FETCH, HUB, PATHS, COMMANDS = "weights/fetch.py", "weights/hub.py", "paths.py", "cli_models.py"
TEST_FETCH = "test_weights_fetch.py"
TEST_HUB, TEST_PATHS, TEST_COMMANDS = "test_weights_hub.py", "test_paths.py", "test_cli_models.py"

MUTATIONS = [
    Mutation(
        FETCH,
        "own = self._token and _origin(target) == self._origin",
        "own = self._token",
        [f"{TEST_FETCH}::test_the_token_goes_to_the_hub_alone"],
        "the token is sent wherever the hub redirects to",
    ),
    Mutation(
        FETCH,
        'target.scheme != "https" and target.scheme != before.scheme',
        'target.scheme not in ("https", "http")',
        [f"{TEST_FETCH}::test_https_is_not_left"],
        "a redirect leaves https",
    ),
    Mutation(
        FETCH,
        "if response.status_code != 206 or given is None:",
        "if response.status_code != 206:",
        [f"{TEST_FETCH}::test_another_range_than_asked_for_is_not_used"],
        "whatever range comes is appended",
    ),
    Mutation(
        FETCH,
        """                with open(part, "wb"):
                    advance(-have)
                have = 0
""",
        "                have = 0\n",
        [f"{TEST_FETCH}::test_a_server_without_ranges_sends_all_again"],
        "a file sent anew is appended to its beginning",
    ),
    Mutation(
        FETCH,
        """                    if have > size:
                        raise""",
        """                    if have > 2 * size:
                        raise""",
        [f"{TEST_FETCH}::test_more_bytes_than_listed_stop_at_once"],
        "a server can fill the disk",
    ),
    Mutation(
        FETCH,
        "failures = 1 if held() > best else failures + 1",
        "failures = failures + 1",
        [f"{TEST_FETCH}::test_waits_grow_while_nothing_comes_and_start_anew_when_something_does"],
        "a large file over a poor line is given up although it comes",
    ),
    Mutation(
        FETCH,
        "best = max(best, held())",
        "best = held()",
        [f"{TEST_FETCH}::test_a_server_that_loses_and_wins_is_given_up"],
        "a server that always starts over is asked for ever",
    ),
    Mutation(
        FETCH,
        "LONGEST_WAIT_S))",
        "1e9))",
        [f"{TEST_FETCH}::test_retry_after_is_honoured_up_to_a_minute"],
        "a server can make the command wait for days",
    ),
    Mutation(
        HUB,
        "        if found == listed:\n",
        "        if found:\n",
        [f"{TEST_HUB}::test_wrong_bytes_always_are_refused_naming_both_hashes"],
        "files are not verified",
    ),
    Mutation(
        HUB,
        "whole if found == listed else None",
        'whole if listed != "-" else None',
        [f"{TEST_HUB}::test_what_was_changed_here_is_not_reused"],
        "a file that was changed on the disk passes for the hub's",
    ),
    Mutation(
        HUB,
        'part in ("", ".", "..")',
        'part in ("", ".")',
        [f"{TEST_HUB}::test_unsafe_names_are_refused"],
        "a listing can name files outside the folder",
    ),
    Mutation(
        HUB,
        "|LICENSE[A-Za-z0-9_-]*",
        "|LICENSE.*",
        [f"{TEST_HUB}::test_a_model_arrives_whole_with_its_manifest"],
        "code comes as a licence",
    ),
    Mutation(
        HUB,
        "            path.unlink()  # begun",
        "            pass  # begun",
        [f"{TEST_HUB}::test_parts_of_another_choice_are_not_installed"],
        "half a file is installed",
    ),
    Mutation(
        HUB,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        [f"{TEST_HUB}::test_two_pulls_of_one_repository_do_not_meet"],
        "two pulls write into one file",
    ),
    Mutation(
        HUB,
        "if there <= {*manifest.files, MANIFEST} and",
        "if",
        [f"{TEST_HUB}::test_a_folder_with_other_files_is_not_replaced"],
        "an update deletes what the user put beside the model",
    ),
    Mutation(
        HUB,
        "fetcher.stop.set()",
        "pass",
        [f"{TEST_HUB}::test_one_failure_stops_the_other_files"],
        "after an error the other files are downloaded to their end",
    ),
    Mutation(
        PATHS,
        'or ".." in Path(name).parts else',
        "else",
        [f"{TEST_PATHS}::test_a_name_may_have_an_organisation_and_stays_inside"],
        "a name leads out of the models",
    ),
    Mutation(
        COMMANDS,
        "if folder.resolve() != root.resolve() / name:",
        "if not folder.exists():",
        [f"{TEST_COMMANDS}::test_rm_does_not_follow_links"],
        "rm deletes what a link leads to",
    ),
    Mutation(
        COMMANDS,
        "if folder.is_relative_to(root)}",
        "if folder.exists()}",
        [f"{TEST_COMMANDS}::test_rm_deletes_models_of_the_home_alone"],
        "rm deletes the model that ships with the package",
    ),
]
