"""How far the gradients of independent batches agree at one checkpoint: the share of signal in an update, by objective.

    python tests/gradient_noise.py 03_rba_rl.py --work DIR --preset small --rewards semantic=1,task=1 --max-steps 6

Runs a stage whose updates change nothing, so that every batch has its gradient at DIR/sft.pt (02: at --init). Prints
|E g|^2 / E|g|^2, estimated without bias by the products of different batches' gradients: 1 where all batches agree, 0 where the
gradient is noise; (1 - share) / share batches are where signal and noise are equal. DIR itself stays as it is.
"""
import importlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

import torch  # noqa: E402


def signal_share(gradients):
    """(B, n) -> |E g|^2 / E|g|^2."""
    products = gradients @ gradients.T                                                     # (B, B)
    b, own = len(products), products.trace()
    return float((products.sum() - own) / (b * (b - 1)) / (own / b))


def main():
    script, flags = sys.argv[1], sys.argv[2:]
    work, found = Path(flags[flags.index("--work") + 1]).resolve(), []

    def kept(optimizer, lr, loss):
        found.append([torch.cat([p.grad.flatten() for p in group["params"]]) for group in optimizer.param_groups])   # of W, of LoRA
        optimizer.zero_grad(set_to_none=True)
        return 0.0
    common.optimizer_step = kept
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "heard", "sft.pt"):
            (Path(folder) / name).symlink_to(work / name)
        flags[flags.index("--work") + 1] = folder
        sys.argv = [script, *flags, "--out", "noise"]
        importlib.import_module(script.removesuffix(".py")).main()
    for part, gradients in zip(("W", "LoRA"), map(torch.stack, zip(*found))):
        print(f"{script} {' '.join(flags)}: {len(found)} batches, {part}: mean norm {gradients.norm(dim=1).mean():.3g}, "
              f"share of signal {signal_share(gradients):.3f}")


if __name__ == "__main__":
    common.run(main)
