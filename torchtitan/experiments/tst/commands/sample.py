"""Look at what a model writes.

    tst sample outputs/demo/tst --prompt "def main("

Further arguments are the job's, as for tst export.
"""

from .arguments import Model


def main(
    overrides: list[str],
    model: Model,
    /,
    prompt: str = "",
    samples: int = 3,
    tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> None:
    """Let a model write.

    Args:
        overrides: the job's arguments.
        model: what writes.
        prompt: What to begin with. By default only the beginning of a document.
        samples: How many.
        tokens: New ones of each, at most.
        temperature: 0 takes the likeliest token.
        top_k: Draw from so many of the likeliest tokens. 0 for all.
        seed: Of the draws.
    """
    from ..results.sampling import sample

    texts = sample(
        model,
        overrides,
        prompt=prompt,
        samples=samples,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{text}")
