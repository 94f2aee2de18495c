"""The overall score in the layout that vLLM's classification conversion takes.

vLLM (vllm-project/vllm, read, not run) makes any generation model a classifier by the name of its architecture:
`XForSequenceClassification` is X with `score`, a linear layer [num_labels, H] on the last token's state after the final
norm, and with one label a sigmoid (model_executor/models/registry.py, adapters.py: as_seq_cls_model,
layers/pooler/activations.py: PoolerClassify). It counts labels in the text section of config.json and in the whole.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.families import read_config
from multitap_jax.files import json_bytes, new_folder
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports.common import copy_carried, rendered_prompts, replaceable
from multitap_jax.scoring.exports.official import ContractWarning
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.saving import CONFIG
from multitap_jax.weights.files import read_json, stored_tensors
from multitap_jax.weights.writer import write_folder

ABOUT = "multitap_vllm.json"
GENERATION, CLASSIFICATION = "ForConditionalGeneration", "ForSequenceClassification"


def export_vllm(
    folder: str | Path, out: str | Path, *, max_shard_bytes: int = 5 << 30, overwrite: bool = False
) -> Path:
    """Writes backbone and reward head for `vllm serve OUT --runner pooling`, and `multitap_vllm.json` about the inputs.

    Ridge heads have no place in this layout. A `ContractWarning` says where vLLM would read a pair otherwise than the
    weights were trained. docs/exporting.md has the limits.

    Raises:
      ArtefactError: the source is none, was edited or damaged, or is of no `...ForConditionalGeneration` architecture.
      FileExistsError: `out` is in the way.
    """
    artefact = Artefact.open(folder)
    heads = artefact.head_arrays()
    config = classification_config(read_json(artefact.folder / CONFIG))
    contract = artefact.manifest.contract
    stored = stored_tensors(artefact.folder)
    score = {"score.weight": heads["reward_head.weight"], "score.bias": heads["reward_head.bias"]}
    headers = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in (stored | score).items()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in stored.items():
            yield name, tensor.read()
        yield from score.items()

    with new_folder(Path(out), replaceable=replaceable(overwrite, ABOUT)) as new:
        copy_carried(artefact.folder, new)
        (new / CONFIG).write_bytes(json_bytes(config))
        (new / ABOUT).write_bytes(json_bytes(_about(artefact, heads["reward_head.bias"])))
        write_folder(new, headers, tensors(), max_shard_bytes)
    family, config_numbers = read_config(artefact.folder)
    position_modes = family.position_modes
    if contract.position_mode != position_modes[0]:
        warnings.warn(
            f"these weights were trained with {contract.position_mode} positions, and vLLM uses the architecture's own "
            f"({position_modes[0]}): other scores",
            ContractWarning,
            stacklevel=2,
        )
    if reading := getattr(config_numbers, "reading", ""):
        warnings.warn(reading, ContractWarning, stacklevel=2)
    return Path(out)


def classification_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as that of a classifier with one label.

    Raises:
      ArtefactError: its architecture is none that vLLM could convert.
    """
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith(GENERATION):
        raise ArtefactError(f"{CONFIG}: architectures = {config.get('architectures')}, expected one ...{GENERATION}")
    label = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    text = config.get("text_config")
    if text is None:  # older files keep the text's entries on top, where the labels of the text cannot be said
        whole = ("architectures", "model_type", "tie_word_embeddings", "image_", "video_", "vision_")
        text = {name: value for name, value in config.items() if not name.startswith(whole)}
        text["model_type"] = f"{config['model_type']}_text"
    named = [architecture.replace(GENERATION, CLASSIFICATION)]
    return {**config, **label, "architectures": named, "text_config": {**text, **label}}


def _about(artefact: Artefact, bias: np.ndarray) -> dict[str, Any]:
    contract = artefact.manifest.contract
    return {
        "contract": dataclasses.asdict(contract),
        **rendered_prompts(artefact),
        "image": f"apply the image policy ({contract.image_policy}) before sending; vLLM resizes by its own rules",
        "score": "sigmoid(score.weight . h + score.bias)",
        "without_score_bias": {
            "why": "versions of vLLM that do not know score.bias: remove the tensor and pass this as --pooler-config",
            "pooler_config": json.dumps({"logit_bias": -float(bias[0])}),
        },
        "fingerprint": artefact.fingerprint,
    }
