"""Public bug reports about meta-learning, optimizers and compression, and the test that holds each one here.

What a user met there must come out right here, or be a clear error. Reports that only had a question or a wish have the
test of what was wanted.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent


class Report(NamedTuple):
    """A report: where it is, what it says, and its tests here."""

    place: str
    says: str
    tests: tuple[str, ...]


OPTIMIZERS, MODELS = "peers/test_bugs_of_optimizers.py", "peers/test_bugs_of_models.py"
GRADIENTS, NORMS = "peers/test_bugs_of_meta_gradients.py", "peers/test_bugs_of_normalisation.py"
DATA, COMPRESSION = "peers/test_bugs_of_data.py", "peers/test_bugs_of_compression.py"
WRAPPED = "maml/test_errors_elsewhere.py::test_models_wrapped_for_processes_are_refused"
PARALLEL = "maml/test_errors_elsewhere.py::test_data_parallel_is_refused"
PROCESSES = "distributed/test_distributed.py::test_the_trajectory_does_not_depend_on_the_number_of_processes"
ZOO = "maml/test_model_zoo.py::test_a_model_trains_as_in_a_loop"
COMPILED = "compile/test_compiled.py::test_second_derivatives_of_a_compiled_learner"
CLIENTS = "interop/test_flower.py::test_three_of_six_clients"
STATE = f"{COMPRESSION}::test_the_memory_belongs_to_a_worker_not_to_a_call"
SPLITS = "tasks/test_omniglot.py::test_splits"
EXACT = f"{GRADIENTS}::test_the_gradient_in_the_initial_weight"

REPORTS = [
    # optimizers and wrappers
    Report("pytorch 196083", "load_state_dict shares the state in one process",
           ("optim/test_optim_from_sgd.py::test_loaded_states_are_copies",)),
    Report("pytorch 192224", "a flattened checkpoint that lacks a parameter is a TypeError about a dict",
           (f"{OPTIMIZERS}::test_a_checkpoint_that_lacks_a_parameter",)),
    Report("pytorch 111131", "bfloat16 cannot be reduced over gloo", (f"{OPTIMIZERS}::test_bfloat16_over_gloo",)),
    Report("gloo 454", "bfloat16 is not supported", (f"{OPTIMIZERS}::test_bfloat16_over_gloo",)),
    Report("pytorch 75666", "states of communication hooks cannot be saved",
           ("interop/test_ddp.py::test_a_saved_state_goes_on",)),
    Report("torchmeta 100", "does it work with DistributedDataParallel?", (WRAPPED, PROCESSES)),
    Report("torchmeta 43", "DataParallel loses the model's methods", (PARALLEL,)),
    Report("torchmeta 97", "DataParallel loses the parameters", (PARALLEL,)),
    Report("learn2learn 197", "does it work with DistributedDataParallel?", (WRAPPED, PROCESSES)),
    # models
    Report("pytorch 164759", "functional_call corrupts a module under two names",
           ("maml/test_registered_twice.py::test_whatever_is_called_the_model_stays",)),
    Report("pytorch 102457", "no batching rule for efficient attention",
           ("maml/test_attention.py::test_attention_agrees_with_its_formula",
            f"{MODELS}::test_a_checkpointed_transformer")),
    Report("pytorch 134606", "no batching rule for GRU",
           (f"{MODELS}::test_recurrent_layers_use_the_adapted_weights",)),
    Report("pytorch 86819", "no batching rule for bags of embeddings",
           (f"{MODELS}::test_bags_of_embeddings_for_each_task",)),
    Report("pytorch 122729", "function transforms refuse saved tensor hooks",
           (f"{MODELS}::test_a_checkpointed_transformer",)),
    Report("pytorch 165880", "vmap does not take checkpointed models",
           (f"{MODELS}::test_a_checkpointed_transformer",
            "maml/test_task_by_task.py::test_checkpointed_parts_run_once")),
    Report("pytorch 86708", "functional_call does not tie weights",
           (f"{MODELS}::test_a_parameter_and_a_buffer_under_two_names",)),
    Report("pytorch 96655", "are batch norm and dropout differentiated under vmap?",
           (f"{NORMS}::test_no_statistic_moves", "maml/test_maml.py::test_dropout_draws_a_mask_for_each_task")),
    Report("pytorch 26302", "the gradient of the padding is not zero",
           (f"{MODELS}::test_the_row_of_the_padding_stays",)),
    Report("functorch 384", "batch norm fails in the Omniglot example",
           (f"{NORMS}::test_second_derivatives_pass_through_the_statistics",)),
    Report("functorch 273", "batch norm in place fails under transforms", (f"{NORMS}::test_no_statistic_moves",)),
    Report("functorch 446", "make_functional refuses shared parameters",
           (f"{MODELS}::test_a_parameter_and_a_buffer_under_two_names",)),
    Report("learn2learn 139", "an LSTM does not use the clone's parameters",
           (f"{MODELS}::test_recurrent_layers_use_the_adapted_weights",)),
    Report("learn2learn 174", "cloning doubles the parameters",
           (f"{MODELS}::test_parts_of_a_model_that_are_registered_again",)),
    Report("learn2learn 314", "an unused parameter is an UnboundLocalError",
           (f"{MODELS}::test_parameters_that_a_task_does_not_use",)),
    Report("pytorch 128711", "vmap cannot call a compiled function",
           (f"{MODELS}::test_a_compiled_part_of_a_model",
            "maml/test_vectorize.py::test_a_compiled_model_runs_as_if_it_were_not")),
    Report("learn2learn 199", "does it work with an LSTM?",
           (f"{MODELS}::test_recurrent_layers_use_the_adapted_weights",)),
    Report("learn2learn 218", "an error with a frozen LSTM, and with a cell",
           (f"{MODELS}::test_a_frozen_lstm_beneath_a_head",)),
    Report("higher 14", "weight norm fails in the inner loop",
           (f"{MODELS}::test_weight_norm_in_an_inner_loop",
            "maml/test_model_zoo.py::test_old_weight_norm_is_as_the_new_one")),
    Report("higher 27", "RNN, LSTM and GRU ignore the adapted weights",
           (f"{MODELS}::test_recurrent_layers_use_the_adapted_weights",)),
    Report("torchopt 144", "a model without meta-parameters: not enough values",
           (f"{MODELS}::test_a_model_without_meta_parameters_says_so",
            f"{MODELS}::test_frozen_normalisation_in_a_model_that_trains")),
    # meta-gradients
    Report("pytorch/benchmark PR 349", "the MAML benchmark has no second derivatives", (EXACT,)),
    Report("MAML-Pytorch 26", "create_graph is missing: first order", (EXACT,)),
    Report("MAML-Pytorch 32", "first or second order? create_graph is missing", (EXACT,)),
    Report("learn2learn PR 244", "the loss is NaN in `adapt` if the learning rate is too high",
           ("maml/test_not_finite.py::test_inner_steps_that_are_too_large",
            "maml/test_not_finite.py::test_the_number_of_inner_steps_is_named")),
    Report("learn2learn 420", "the loss is the same after adapt",
           (f"{GRADIENTS}::test_the_loss_after_adaptation_is_that_of_the_adapted_weights",)),
    Report("learn2learn 230", "each step is slower than the last",
           ("maml/test_memory.py::test_no_graph_of_a_step_that_is_over", "maml/test_maml.py::test_no_graph_is_kept")),
    Report("higher 69", "the parameters' gradient is None",
           (EXACT, f"{GRADIENTS}::test_the_weight_moves_with_the_optimizer")),
    Report("pytorch 181581", "compiling drops the graph of gradients, silently",
           (COMPILED, "maml/test_vectorize.py::test_a_compiled_model_runs_as_if_it_were_not")),
    Report("pytorch 183603", "compiled second derivatives are an error", (COMPILED,)),
    Report("pytorch 91469", "compiled second derivatives are wrong, silently", (COMPILED,)),
    # normalisation
    Report("pytorch-maml 8", "why are running statistics turned off?", (f"{NORMS}::test_no_statistic_moves",)),
    Report("pytorch-maml PR 7", "larger batches of queries give better results",
           (f"{NORMS}::test_a_query_by_itself_is_predicted_as_among_others",)),
    Report("higher 107", "test tasks leak into the running statistics",
           (f"{NORMS}::test_no_task_of_an_evaluation_leaks_into_another",)),
    Report("LearningToCompare_FSL 48", "batch norm leaks the test queries",
           (f"{NORMS}::test_a_prediction_does_not_see_the_other_queries",)),
    Report("MAML++ 24", "batch norm ignores its evaluation mode", (f"{NORMS}::test_running_statistics_can_be_used",)),
    Report("cbfinn/maml 43", "gain and shift are not adapted",
           (f"{NORMS}::test_gains_and_shifts_adapt_unless_they_are_left_out",)),
    # data
    Report("easyfsl 44", "own data: sample larger than population",
           (f"{DATA}::test_too_few_classes_or_images", f"{DATA}::test_a_folder_without_images")),
    Report("easyfsl 63", "must the classes have equally many queries?",
           (f"{DATA}::test_classes_with_different_numbers_of_queries",)),
    Report("easyfsl 64", "own folder: sample larger than population", (f"{DATA}::test_a_folder_without_images",)),
    Report("easyfsl 68", "2 ways, 5 shots: sample larger than population",
           (f"{DATA}::test_too_few_classes_or_images", f"{DATA}::test_just_enough_classes_and_images")),
    Report("learn2learn 131", "n ways give fewer than n samples", (f"{DATA}::test_as_many_ways_as_asked",)),
    Report("cbfinn/maml PR 14", "validation and test were swapped: 100 characters to test on", (SPLITS,)),
    Report("prototypical-networks 7", "an alphabet is in both train and test", (SPLITS,)),
    Report("MatchingNetworks 4", "only training images are normalised, and classes are of any alphabet",
           (f"{DATA}::test_every_split_has_the_same_pixels", f"{DATA}::test_tasks_within_an_alphabet")),
    # compression
    Report("grace 7", "compensate() misses the argument name", (STATE,)),
    Report("grace 9", "is Top-K of the whole update or of each layer?",
           (f"{COMPRESSION}::test_top_k_of_the_whole_gradient_or_of_each_layer",)),
    Report("grace 10", "EF-SignSGD never uses its memory",
           (f"{COMPRESSION}::test_signs_with_error_feedback_use_their_memory",)),
    Report("grace 19", "why a memory, and does it accumulate?",
           (f"{COMPRESSION}::test_what_is_held_back_is_sent_later",)),
    Report("byteps PR 225", "error feedback and momentum around any compressor",
           ("bias/test_feedback.py::test_recurrences_worker_by_worker",
            "bias/test_worker_momentum.py::test_momentum_on_the_workers_is_not_averaged_again_by_the_server")),
    Report("flower 1910", "is a client the same one in the next round?", (STATE, CLIENTS)),
    Report("flower 2033", "clients of a baseline need a state", (STATE, CLIENTS)),
    Report("flower 2216", "a simulated client forgets what it accumulates", (STATE, CLIENTS)),
]  # fmt: skip


@cache
def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.place)
def test_every_report_has_its_test(report):
    for test in report.tests:
        path, _, name = test.partition("::")
        assert name in functions_in(HERE / path), f"{report.place} wants {test}"


def test_each_report_is_there_once():
    places = [report.place for report in REPORTS]
    assert len(places) == len(set(places))
