#!/usr/bin/env bash
# timm's features_only=True gives a Vision Transformer's patches before the final norm, and throws the norm away.
#
# One would believe: create_model(name, features_only=True, out_indices=(-1,)) gives the same last patch features as
# forward_features of the model, only as a map [B, D, H, W].
#
# What happens: forward_features ends with the final norm, whose weights are trained. features_only replaces that norm
# by the identity, so the features have other directions and lengths. Nothing in the map's shape tells.
# (forward_intermediates has an option norm=True, which is off by default.)
#
# Seen with torch 2.14.1, timm 1.0.31, Python 3.11, with random weights, also in the norm:
#   features_only: cosine 0.6 with forward_features, norm of the model: Identity
#   forward_intermediates(norm=True): cosine 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
venv/bin/python - <<'PY'
import timm
import torch
import torch.nn.functional as F

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
torch.nn.init.uniform_(model.norm.weight, 0, 2)
torch.nn.init.normal_(model.norm.bias)
maps = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(-1,)).eval()
left = maps.model.load_state_dict(model.state_dict(), strict=False).unexpected_keys
images = torch.rand(2, 3, 224, 224)
with torch.no_grad():
    features = model.forward_features(images)[:, 1:]
    only = maps(images)[0].flatten(2).transpose(1, 2)
    normed = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
cosine = F.cosine_similarity(only, features, dim=-1).mean().item()
right = F.cosine_similarity(normed.flatten(2).transpose(1, 2), features, dim=-1).mean().item()
print(f"features_only: cosine {cosine:.1f} with forward_features, norm of the model: {type(maps.model.norm).__name__}")
print(f"forward_intermediates(norm=True): cosine {right:.1f}")
assert cosine < 0.95 and right > 0.9999 and left == ["norm.weight", "norm.bias"], "this has changed"
PY
