"""Random models of the hub's architectures, saved by transformers in both layouts, with the logits
it computes.
"""

from benchmarks.parity import LAYOUTS, MODELS, TOKENS, random_model, save
from tests.runs import scratch, shared

ARCHITECTURES = tuple(MODELS)


@shared
def hub_models():
    """`{architecture: ({layout: directory}, logits of TOKENS)}`; the tensors of an expert each lie
    in many shards.
    """
    import torch  # of the development extra, on Python 3.11 only

    found = {}
    for name in MODELS:
        model = random_model(name)
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS)).logits.numpy()
        folders = {layout: scratch("hub") / f"{name}_{layout}" for layout in LAYOUTS}
        for layout, folder in folders.items():
            save(model, folder, layout)
        found[name] = folders, logits
    return found
