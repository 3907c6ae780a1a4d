"""Results and records of runs that never were, with known answers, for the tests of comparisons."""

import hashlib
import json

from seedlm.evaluation.records import pack_records

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"
PIECES = {"0": " the", "1": " cat", "2": " sat", "3": "\n", "4": EVIL}
IDS = [[0, 1, 2, 0, 3, 1], [4, 0, 1, 2, 4, 0]]
FORMAT = "block-k16-c8-p3-q4-e4"


def estimate(mean, error=0.01):
    return {"mean": mean, "standard_error": error}


def model(name, fingerprint, **changes):
    info = {"name": name, "format": "float32", "bits_per_weight": 32.0, "model_bits_per_weight": 32.0, "weights": 1_000_000}
    return {**info, "bytes": 4_000_000, "fingerprint": fingerprint, **changes}


def synthetic(number):
    """Results and records of a compressed model; the higher its number, the worse."""
    bits = 4 - 0.05 * number
    nbytes = int(bits * 1e6 / 8)
    results = {
        "evaluation_version": 1,
        "model": model(
            f"packed {number}", f"p{number}", format=FORMAT, bits_per_weight=bits, bytes=nbytes, model_bits_per_weight=bits
        ),
        "reference": model("original", "o"),
        "settings": {"context": 6},
        "text": {"path": "/texts/wiki_test.raw", "sha256": "abc", "tokens": 12, "windows": 2},
        "protocol": "windows & tokens",
        "environment": {"device_name": "cpu", "torch": "2", "transformers": "5", "commit": "c"},
        "metrics": {
            "nll": estimate(3 + 0.1 * number),
            "perplexity": estimate(20.5 + number, 0.25),
            "kl": estimate(0.1 + 0.1 * number, 0.004),
            "top1_agreement": estimate(0.9 - 0.01 * number),
            "reference_nll": estimate(2.9),
            "reference_perplexity": estimate(18.0, 0.2),
            "perplexity_ratio": estimate(1.1),
        },
        "tasks": {"arc_easy": {"version": 1.0, "questions": 3, "acc": estimate(0.5, 0.1), "acc_norm": estimate(1 / 3, 0.2)}},
        "run": {"dtype": "float32", "reference_dtype": "float32", "tokens_per_second": 5.0, "peak_memory_bytes": 7},
    }
    kl = [[0.01 * (number + 1)] * 5 for _ in IDS]
    kl[1][number % 5] = 5.0 + number
    errors = [
        {"module": f"model.layers.{n}.mlp.up_proj", "shape": [4, 4], "weight_error": 0.1, "output_error": 0.2} for n in (0, 1)
    ]
    records = {
        "tokens": {
            "token_ids": IDS,
            "nll": [[1.0 + number] * 5] * 2,
            "top1": [[2, 2, 0, 4, 1], [0, 1, 2, 4, 0]],
            "kl": kl,
            "reference_nll": [[0.5] * 5] * 2,
            "reference_top1": [[1, 2, 0, 3, 1], [2, 1, 2, 4, 0]],
            "pieces": PIECES,
        },
        "distributions": {
            "kl": {"edges": [0.1, 1, 10], "counts": [9, 1]},
            "nll_change": {"edges": [-1, 0, 1], "counts": [4, 6]},
        },
        "prompts": [{"prompt": f"Say {EVIL}", "text": f" {EVIL} {number}", "reference_text": " something else"}],
        "layers": {"linears": errors, "hidden": [0.1, round(0.2 + 0.01 * number, 2)]},
        "tasks": {
            "arc_easy": [
                {
                    "id": n,
                    "right": 0,
                    "chosen": chosen,
                    "log_likelihoods": scores,
                    "question": f"{EVIL}{n}?",
                    "choices": ["yes", EVIL],
                }
                for n, (chosen, scores) in enumerate([(1, [-2.0, -1.0]), (0, [-1.0, -3.0]), (1, [-9.0, -1.0])])
            ]
        },
    }
    return results, records


def original_run():
    """The same for the model that all were made from: it answers the first two questions right."""
    results, records = synthetic(0)
    results["model"], results["reference"] = results["reference"], None
    results["metrics"] = {"nll": estimate(2.9), "perplexity": estimate(18.0, 0.2)}
    records["layers"], records["distributions"] = None, {}
    for field in ("kl", "reference_nll", "reference_top1"):
        del records["tokens"][field]
    records["prompts"][0].update(text=" something else", reference_text=None)
    for row, scores in zip(records["tasks"]["arc_easy"], [(-1.0, -2.0), (-1.0, -3.0), (-3.0, -1.0)], strict=True):
        row.update(log_likelihoods=list(scores), chosen=int(scores[1] > scores[0]))
    return results, records


def write(folder, name, results, records=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if records is not None:
        data = pack_records(records)
        file = f"{name}.records.json.gz"
        (folder / file).write_bytes(data)
        results = {**results, "records": {"file": file, "sha256": hashlib.sha256(data).hexdigest()}}
    path.write_text(json.dumps(results))
    return path
