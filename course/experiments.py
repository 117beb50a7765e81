"""Small experiments of the handout, each a minute or less on a CPU.

    python course/experiments.py neighbours     # assignment 1: what does a position bias learn?
    python course/experiments.py masks          # assignment 2: how far is a hidden patch from a visible one?
    python course/experiments.py quantizer      # assignment 3: which codes are used, after which start?
    python course/experiments.py swap RUN       # assignment 6: what does the head take from [CLS]?

Each prints figures for the seeds 0, 1 and 2.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import beitv2  # noqa: E402
import data  # noqa: E402
import pretrain  # noqa: E402
import tokenizer as vqkd  # noqa: E402
from support.cls_swap import another_image, predict, with_other_cls  # noqa: E402
from support.datasets import open_dataset  # noqa: E402
from support.options import load_config  # noqa: E402

SEEDS = (0, 1, 2)


def neighbours(steps: int = 600, grid: int = 4, width: int = 32) -> None:
    """Copy your left neighbour: a task that attention can only do if it knows where patches lie."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        for biased in (True, False):
            # No positions but the bias table, so that only the table can tell left from right.
            model = beitv2.VisionTransformer(image_size=grid, patch_size=1, in_channels=width, embed_dim=width, depth=1,
                                             num_heads=4, rel_pos_bias="shared" if biased else None)
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for step in range(steps):
                images = torch.randn(64, width, grid, grid)
                predicted = model(images)[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
                loss = F.mse_loss(predicted[..., 1:], images[..., :-1])  # the first column has no left neighbour
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"seed {seed}, {'with   ' if biased else 'without'} position bias: error {loss.item():.2f}")
            if biased and seed == 0:
                table = model.rel_pos_bias.relative_position_bias_table[:-3].detach().max(dim=1).values
                print("the largest bias of all heads, for each offset (query minus key) in rows and columns:")
                for row in table.view(2 * grid - 1, -1):
                    print(" ".join(f"{value:6.1f}" for value in row))


def masks(grid: int = 14, num_masked: int = 75, count: int = 300) -> None:
    """Blocks against single patches: the distance to what is visible, and how well copying it fills the hole."""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        single = torch.zeros(grid**2, dtype=torch.bool)
        single[:num_masked] = True
        kinds = {"blocks": lambda: data.block_mask(grid, num_masked, 16, generator),
                 "single": lambda: single[torch.randperm(grid**2, generator=generator)]}
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        places = torch.stack([y.flatten(), x.flatten()], dim=1).float()
        shapes = open_dataset(data.DataConfig("shapes", image_size=grid * 4, val_images=count), "val")
        samples = data.ValSamples(shapes, grid * 4)
        colours = torch.stack([data.to_unit(samples[i]["image"]) for i in range(count)])
        colours = F.avg_pool2d(colours, 4).flatten(2).transpose(1, 2)  # [count, N, 3], the mean colour of each patch
        for kind, draw in kinds.items():
            lonely = distance = error = spread = 0.0
            for colour in colours:
                mask = draw()
                away = torch.cdist(places[mask], places[~mask])  # [masked, visible]
                nearest = away.min(dim=1)
                lonely += (nearest.values > 1).float().mean().item() / count
                distance += nearest.values.mean().item() / count
                copied = colour[~mask][nearest.indices]
                error += (copied - colour[mask]).square().mean().item() / count
                spread += (colour[~mask].mean(dim=0) - colour[mask]).square().mean().item() / count
            print(f"seed {seed}, {kind}: {lonely:.0%} of the masked patches touch no visible one, the nearest is "
                  f"{distance:.2f} patches away; copying it leaves {error / spread:.0%} of the error of a mean colour")


def quantizer(codes: int = 64, dim: int = 16, steps: int = 300) -> None:
    """Vectors around 64 directions, some of them rare: three ways to begin, and revival."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        centre = F.normalize(torch.randn(dim), dim=0)
        directions = F.normalize(centre + 0.3 * torch.randn(codes, dim), dim=1)  # in one region, as a network's are
        chances = 1 / torch.arange(1.0, codes + 1)

        def draw(count: int) -> Tensor:
            chosen = torch.multinomial(chances, count, replacement=True)
            return directions[chosen] + 0.05 * torch.randn(count, dim)

        first, test = draw(2048), draw(4096)
        for name, start, revive_below in (("random", False, 0.0), ("k-means", True, 0.0),
                                          ("random, revival", False, 0.5), ("k-means, revival", True, 0.5)):
            q = vqkd.Quantizer(codes, dim, ema_decay=0.95, revive_below=revive_below).train()
            if start:
                q.init_from(first, seed)
            for step in range(steps):
                q(draw(512)[None])
                q.remember()
                q.update(seed=step)
            q.eval()
            ids, loss = q(test[None])[1:]
            hits = ids.flatten().bincount(minlength=codes)
            print(f"seed {seed}, {name:<16}: {(hits > 0).sum():2d} of {codes} codes used, perplexity "
                  f"{vqkd.perplexity(hits.double()):4.1f}, squared distance {dim * loss:.4f}")


@torch.no_grad()
def swap(run: str) -> None:
    """The head's accuracy with the image's own [CLS], with that of another image, and with the mean of all."""
    checkpoint = beitv2.read_checkpoint(f"{run}/pretrain/last.pt")
    saved = checkpoint["config"]["pretrain"]
    config = load_config(pretrain.SECTIONS, ["configs/demo.yaml", f"output_dir={run}"])
    for name in ("num_masked", "min_block", "early_layers", "head_layers", "shared_lm_head"):
        setattr(config.pretrain, name, saved[name])
    tokenizer, _ = vqkd.load_tokenizer(config, saved["tokenizer_weights"], "pretrain.tokenizer_weights")
    model = pretrain.build_model(config, tokenizer.num_ids).eval()
    beitv2.load_pretrained(model, checkpoint)
    if not model.head_layers:
        sys.exit(f"error: the model in '{run}' was trained without an aggregation head, which alone reads [CLS]")
    size = config.data.image_size
    samples = data.ValSamples(open_dataset(config.data, "val"), size)
    images = data.to_unit(torch.stack([samples[i]["image"] for i in range(1000)]))
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        cfg = config.pretrain
        mask = torch.stack([data.block_mask(model.grid, cfg.num_masked, cfg.min_block, generator) for _ in images])
        masked = beitv2.masked_positions(mask, cfg.num_masked)
        ids = beitv2.take(tokenizer.token_ids(images), masked)
        _, read = predict(model, data.normalize(images), masked)
        own = read[:, 0]
        for name, cls in {"its own": own, "another image's": own[another_image(len(own))],
                          "the mean": own.mean(dim=0).expand_as(own)}.items():
            loss, hits = beitv2.score(with_other_cls(model, read, cls, masked), ids)
            print(f"seed {seed}, the head with {name} [CLS]: loss {loss:.3f}, accuracy {hits.float().mean():.1%}")


if __name__ == "__main__":
    experiments = {function.__name__: function for function in (neighbours, masks, quantizer, swap)}
    if len(sys.argv) < 2 or sys.argv[1] not in experiments or (len(sys.argv) == 3) != (sys.argv[1] == "swap"):
        sys.exit(__doc__)
    experiments[sys.argv[1]](*sys.argv[2:])
