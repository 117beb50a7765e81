"""Writes a trained model as a folder that the library `transformers` opens: config.json and model.safetensors.

No reader of the method needs this file: it renames tensors, and says as a configuration what their shapes tell.
"""

import json
import math
import re
from pathlib import Path

from torch import Tensor

from beitv2 import ALWAYS_DROPPED_ENDS
from support.errors import explained

# Our names, as patterns, and those of the BEiT folders that are published for transformers, whose versions 4 and 5 read
# them.
RENAMED = {
    r"^patch_embed\.proj": "beit.embeddings.patch_embeddings.projection",
    r"^(cls_token|mask_token)": r"beit.embeddings.\1",
    r"^pos_embed": "beit.embeddings.position_embeddings",
    r"^rel_pos_bias": "beit.encoder.relative_position_bias",
    r"^blocks": "beit.encoder.layer",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"gamma_": "lambda_",
    r"attn\.(query|key|value)": r"attention.attention.\1",
    r"attn\.q_bias": "attention.attention.query.bias",
    r"attn\.v_bias": "attention.attention.value.bias",
    r"attn\.proj": "attention.output.dense",
    r"attn\.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    r"^fc_norm": "beit.pooler.layernorm",
    r"^head": "classifier",
}


def write_transformers(state: dict[str, Tensor], folder: Path, num_heads: int, image_size: int, pooling: str,
                       classes: list[str]) -> str | None:
    """Write the model with the tensors `state` into `folder`.

    num_heads    for a model without bias tables (whose shapes say it)
    image_size   pixels, for a model without bias tables and position embeddings (whose shapes say it)
    pooling      how a classifier pools: "mean" or "cls"
    classes      names of a classifier's classes; none if they are not known
    returns      the name of the model's class there: BeitForImageClassification, or for a pre-trained model
                 BeitForMaskedImageModeling, which has no aggregation head (it is left out). None, and nothing is
                 written, if transformers has no class for the model
    """
    classifier = "head.weight" in state
    known = pooling in ("mean", "cls") if classifier else "lm_head.weight" in state
    if not known or "blocks.0.attn.q_bias" not in state:  # a Vision Transformer of another kind has none
        return None
    config = described(state, num_heads, image_size)
    if classifier:
        names = classes or [f"class {k}" for k in range(len(state["head.weight"]))]
        config |= {"architectures": ["BeitForImageClassification"], "use_mean_pooling": pooling == "mean",
                   "id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    else:  # what transformers calls mean pooling leaves the norm out of the backbone; it stands before lm_head there
        config |= {"architectures": ["BeitForMaskedImageModeling"], "use_mean_pooling": True, "use_mask_token": True,
                   "vocab_size": len(state["lm_head.weight"])}
    unknown = ("mask_token", "cls_pt_") if classifier else ("cls_pt_",)
    renamed = RENAMED | {r"^norm": "beit.layernorm" if classifier else "layernorm"}
    tensors = {}
    for name, value in state.items():
        if name.startswith(unknown) or name.endswith(ALWAYS_DROPPED_ENDS):
            continue
        # One matrix for queries, keys and values is three matrices there.
        parts = zip(("query", "key", "value"), value.chunk(3)) if "qkv" in name else [("", value)]
        for part, rows in parts:
            new = name.replace("qkv", part)
            for ours, theirs in renamed.items():
                new = re.sub(ours, theirs, new)
            tensors[new] = rows
    with explained(f"cannot write into '{folder}'", "free some space or choose another output_dir", OSError):
        folder.mkdir(exist_ok=True)
        write_safetensors(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config["architectures"][0]


def described(state: dict[str, Tensor], num_heads: int, image_size: int) -> dict:
    """The backbone's part of config.json: what the shapes of its tensors say, and what they do not."""
    tables = [value for name, value in state.items() if name.endswith("relative_position_bias_table")]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    if tables:  # [(2 grid - 1)^2 + 3, H]
        num_heads, image_size = tables[0].shape[1], (math.isqrt(len(tables[0]) - 3) + 1) // 2 * patch_size
    elif "pos_embed" in state:  # [1, 1 + grid^2, D]
        image_size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size
    return {
        "model_type": "beit",
        "hidden_size": state["cls_token"].shape[-1],
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_attention_heads": num_heads,
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "image_size": image_size,
        "patch_size": patch_size,
        "layer_norm_eps": 1e-6,  # the library's default is another, and changes the logits in the fourth digit
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,  # 0: none; else the tensors have it
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in state,
    }


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write float32 tensors in the safetensors format: the header's length in 8 bytes, a header in JSON, all numbers.

    The header says of each tensor its type, its shape, and at which bytes after the header it begins and ends.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        begin, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8 bytes, as readers expect
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.float().numpy().astype("<f4").tobytes())
