"""Generate text with a model.

    tst sample outputs/demo/tst --prompt "def main("

Further arguments override the job, as for tst export.
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
    """Generate text.

    Args:
        overrides: Arguments of the job.
        model: The model to use.
        prompt: Beginning of the text. By default the text begins like a document.
        samples: Number of texts.
        tokens: Maximum number of new tokens of each text.
        temperature: Temperature of sampling. 0 takes the most likely token.
        top_k: Sample from this many of the most likely tokens. 0 for all.
        seed: Seed of sampling.
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
