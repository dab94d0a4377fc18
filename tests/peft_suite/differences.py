"""Which of PEFT's tests run, and which are expected to pass with PEFT's classes only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import attrs

ANOTHER_BASE = "BaseModelMismatchError"
"""What a test fails with that loads an adapter onto another base model than it was saved with.

Many of PEFT's tests do, since they make the base model anew without a seed. We refuse that, which
is what the package is for; such a test must pass once the refusal is a warning, and needs no entry
below.
"""


@attrs.frozen
class Difference:
    """Tests that pass with PEFT's classes, and are not to pass with ours.

    Attributes:
        pattern: A regular expression that is found in the tests' ids.
        error: A regular expression that is found in what each fails with.
        reason: Why it is right that they fail.
        classes: With which classes of ours they do.
    """

    pattern: str
    error: str
    reason: str
    classes: Collection[str] = ("installed", "peftstate")

    def names(self, test: str, classes: str) -> bool:
        """Whether a test is one of these."""
        return classes in self.classes and re.search(self.pattern, test) is not None

    def explains(self, failure: str) -> bool:
        """Whether it fails in the expected way."""
        return re.search(self.error, failure) is not None


DIFFERENCES = (
    Difference(
        r"test_adaption_prompt\.py::.*::test_save_pretrained_multiple_adapters_keeps_weights_apart",
        r"Tensor-likes are not close",
        "A folder of several adapters comes back with all of them and with the active one active, "
        "where PEFT loads the folder's own adapter only.",
    ),
    Difference(
        r"test_auto\.py::.*::test_import_allow_list_prevents_arbitrary_imports",
        r"adapters\.adapters\.default\.config\.|class imported from 'os'",
        "The test edits the adapter's config to name a module that must not be imported. A config "
        "that is not as it was saved is refused before that.",
    ),
    Difference(
        r"test_from_pretrained_config_construction\[(CPT|PromptEncoder)Config",
        r"inference_mode\nE   AssertionError",
        "A prompt that layers compute keeps them in a load for inference, so its config does not "
        "say inference_mode, with which PEFT takes the embedding that its file has for the result.",
    ),
    Difference(
        r"test_initialization\.py::test_from_pretrained_missing_keys_warning"
        r"|TestHotSwapping::test_hotswap_missing_key_works",
        r"AssertionError|assert False|assert tensor\(False\)",
        "The test replaces the model's state_dict() to have a key left out. A save takes the "
        "tensors from the modules, since state_dict() changes 4-bit layers, and leaves out none.",
    ),
    Difference(
        r"TestStateDictFsdpShapeValidation::test_save_pretrained_warns_for_unsharded_state_dict",
        r"SaveError",
        "PEFT warns that a shard is saved in place of a tensor; we refuse to, and PEFT's files lie "
        "in a folder beside it.",
    ),
    Difference(
        r"test_unilora\.py::TestUniLora::test_missing_theta_d_key_warns_on_load",
        r"IntegrityError",
        "The test takes a tensor out of the file. A file that is not as it was saved is refused.",
    ),
    Difference(
        r"test_vblora\.py::TestVBLoRA::test_resume_training_model_with_topk_weights",
        r"DID NOT RAISE",
        "PEFT's file has not all that training needs, and PEFT says so. We keep the rest beside "
        "it, so that training goes on.",
    ),
)

QUICK: Mapping[str, str] = {
    "test_adaption_prompt.py": "",
    "test_auto.py": "",
    "test_custom_models.py": r"::test_(save_pretrained|load_\w+)\[.*MLP.*1"
    r"|::test_save_load_roundtrip\[(?!.*MLP).* 1 ",
    "test_helpers.py": "",
    "test_initialization.py": "",
    "test_lora_conversion.py": "",
    "test_lora_variants.py": "",
    "test_low_level_api.py": "",
    "test_mapping.py": "",
    "test_mixed.py": "",
    "test_other.py": "",
    "test_trainable_tokens.py": "",
    "test_unilora.py": "",
    "test_vblora.py": "",
    "test_vera.py": "",
    "test_xlora.py": "save_load",
}
"""What runs by default: the files, and a regular expression that is in the ids of the tests."""

UNUSABLE = (
    "test_gpu_examples.py",
    "test_hub_features.py",
    "test_torch_compile.py",
    "test_vision_models.py",
)
"""Files of which no test runs on a CPU, offline, in a reasonable time."""
