"""Predictions and layers of two models, held against a float64 computation that shares nothing with it."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch

from seedlm.errors import EvaluationError
from seedlm.evaluation import layer_errors as layers
from seedlm.evaluation import perplexity
from straightforward import straightforward
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random Llamas of one vocabulary."""
    folder = tmp_path_factory.mktemp("pair")
    return [tiny_llama(folder / str(seed), dtype=torch.float32, seed=seed).eval() for seed in (0, 1)]


class TestPerplexity:
    @pytest.mark.parametrize("chunk", [{}, {"chunk": 1}, {"chunk": 64 * 3}], ids=["one-chunk", "row-by-row", "three-rows"])
    @pytest.mark.parametrize(("context", "batch_size"), [(7, 1), (7, 3), (2, 9), (30, 2)])
    def test_records_are_those_of_float64(self, pair, context, batch_size, chunk):
        windows = perplexity.cut_windows(torch.randint(64, (61,), generator=torch.Generator().manual_seed(2)), context)
        scored = perplexity.score_windows(pair[0], windows, reference=pair[1], batch_size=batch_size, **chunk)
        records = np.concatenate([records for records, _ in scored])
        expected = straightforward(pair[0], windows, pair[1])
        assert records.shape == expected.shape[:2] == (61 // context, context - 1)
        for column, field in enumerate(perplexity.PAIR_RECORD.names):
            np.testing.assert_allclose(records[field], expected[..., column], rtol=2e-6, atol=2e-6, err_msg=field)
        alone = np.concatenate([records for records, _ in perplexity.score_windows(pair[0], windows, batch_size=batch_size)])
        assert alone.dtype == perplexity.RECORD
        assert all((alone[field] == records[field]).all() for field in perplexity.RECORD.names)

    def test_means_and_errors(self, pair):
        windows = perplexity.cut_windows(torch.randint(64, (50,), generator=torch.Generator().manual_seed(3)), 10)
        expected = straightforward(pair[0], windows, pair[1])
        records = np.concatenate([records for records, _ in perplexity.score_windows(pair[0], windows, reference=pair[1])])
        found = perplexity.summarize(records)

        def check(name, per_window, exponential=False):
            mean, error = statistics.mean(per_window), statistics.stdev(per_window) / math.sqrt(5)
            if exponential:
                mean, error = math.exp(mean), math.exp(mean) * error
            assert (found[name].mean, found[name].standard_error) == pytest.approx((mean, error), rel=1e-5, abs=1e-7)

        nll, _, kl, other, _ = expected.mean(axis=1).T.tolist()
        check("nll", nll)
        check("perplexity", nll, exponential=True)
        check("kl", kl)
        check("reference_nll", other)
        check("reference_perplexity", other, exponential=True)
        check("perplexity_ratio", [a - b for a, b in zip(nll, other, strict=True)], exponential=True)
        check("top1_agreement", (expected[..., 1] == expected[..., 4]).mean(axis=1).tolist())
        assert found.keys() == {"nll", "perplexity", "kl", "reference_nll", "reference_perplexity", "perplexity_ratio"} | {
            "top1_agreement"
        }

    def test_perplexity_is_gptqs(self, pair):
        """GPTQ's arithmetic: each window's mean loss times the context, summed, over windows times context."""
        tokens = torch.randint(64, (35,), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            losses = [pair[0](w[None], labels=w[None]).loss * 8 for w in tokens[:32].view(4, 8)]
        expected = math.exp(sum(losses) / (4 * 8))
        assert perplexity.perplexity(pair[0], tokens, context=8).mean == pytest.approx(expected, rel=1e-5)
        fewer = math.exp(sum(losses[:2]) / (2 * 8))
        assert perplexity.perplexity(pair[0], tokens, context=8, limit=2).mean == pytest.approx(fewer, rel=1e-5)

    def test_one_window_has_no_error(self, pair):
        assert perplexity.perplexity(pair[0], torch.arange(9), context=8).standard_error is None

    def test_a_model_equals_itself(self, pair):
        records = next(perplexity.score_windows(pair[0], torch.arange(12).view(2, 6), reference=pair[0], batch_size=2))[0]
        found = perplexity.summarize(records)
        assert (found["kl"].mean, found["top1_agreement"].mean, found["perplexity_ratio"].mean) == (0.0, 1.0, 1.0)
        assert found["perplexity_ratio"].standard_error == 0.0

    def test_predictions_that_are_not_finite_are_refused(self, tmp_path):
        model = tiny_llama(tmp_path / "m", dtype=torch.float32).eval()
        model.lm_head.weight.data[5, 0] = math.inf
        with pytest.raises(EvaluationError, match="window 3: the model's log likelihood is not finite; float16 overflows"):
            list(perplexity.score_windows(model, torch.arange(20).view(5, 4), start=3))

    def test_other_vocabularies_are_refused(self, pair, tmp_path):
        other = tiny_llama(tmp_path / "m", dtype=torch.float32, vocab_size=70).eval()
        with pytest.raises(EvaluationError, match="the reference scores 70 tokens, the model 64"):
            list(perplexity.score_windows(pair[0], torch.arange(8).view(2, 4), reference=other))

    @pytest.mark.parametrize(
        ("context", "limit", "message"),
        [(1, None, "at least 2 tokens"), (5, 0, "at least 1 window"), (11, None, "has 10 tokens, one window needs 11")],
    )
    def test_impossible_windows_are_refused(self, context, limit, message):
        with pytest.raises(EvaluationError, match=message):
            perplexity.cut_windows(torch.arange(10), context, limit)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_gpu_gives_the_same(self, pair):
        windows = torch.randint(64, (6, 9), generator=torch.Generator().manual_seed(5))
        expected = straightforward(pair[0], windows, pair[1])
        try:
            scored = perplexity.score_windows(pair[0].cuda(), windows, reference=pair[1].cuda(), batch_size=4)
            records = np.concatenate([records for records, _ in scored])
        finally:
            pair[0].cpu(), pair[1].cpu()
        for column, field in enumerate(perplexity.PAIR_RECORD.names):
            np.testing.assert_allclose(records[field], expected[..., column], rtol=1e-5, atol=1e-5, err_msg=field)


class Foreign(torch.nn.Module):
    """Another library's layer: it computes like a linear one and has nothing else in common with it."""

    def __init__(self, linear):
        super().__init__()
        self.hidden = [linear.weight.detach().double(), None if linear.bias is None else linear.bias.detach().double()]

    def forward(self, x):
        return torch.nn.functional.linear(x.double(), *self.hidden).to(x.dtype)


class TestLayers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("foreign", [False, True], ids=["linear", "foreign"])
    def test_errors_are_those_of_the_definition(self, tmp_path, foreign, dtype):
        reference = tiny_llama(tmp_path / "m", dtype=dtype, attention_bias=True).eval()
        for name, parameter in reference.named_parameters():
            if name.endswith("bias"):
                parameter.data.uniform_(-100, 100)
        model = copy.deepcopy(reference)
        torch.manual_seed(7)
        changed = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.k_proj", "mlp.down_proj")]
        for name in changed:
            linear = model.get_submodule(name)
            linear.weight.data += 0.1 * linear.weight.std() * torch.randn_like(linear.weight)
            if foreign:
                model.set_submodule(name, Foreign(linear))
        windows = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))
        given, states = {}, []
        for network in (model, reference):
            if network is reference:
                for name in changed:
                    network.get_submodule(name).register_forward_hook(
                        lambda module, inputs, output, name=name: given.setdefault(name, []).append((inputs[0], output))
                    )
            with torch.no_grad():
                found = [network(w[None], output_hidden_states=True).hidden_states[1:] for w in windows]
            states.append([torch.cat(layer)[:, 1:].double() for layer in zip(*found, strict=True)])
        result = layers.compare_layers(model, reference, windows, probe=44 * 7)
        rows = {row.pop("module"): row for row in result["linears"]}
        assert len(rows) == 15  # the head too
        assert rows["model.layers.0.mlp.down_proj"]["shape"] == [32, 44]
        for name, row in rows.items():
            if name not in changed:
                assert (row["weight_error"], row["output_error"]) == (0.0, 0.0)
                continue
            theirs, ours = reference.get_submodule(name), model.get_submodule(name)
            weight = theirs.weight.double()
            difference = (ours.hidden[0] if foreign else ours.weight.double()) - weight
            expected = float((difference.norm() / weight.norm()).detach())
            assert row["weight_error"] == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.02)
            with torch.no_grad():
                outputs = [(ours(x).double()[0, 1:], y.double()[0, 1:]) for x, y in given[name]]
            top, bottom = (
                sum(float(y.square().sum()) for y in part) for part in ([a - b for a, b in outputs], [b for _, b in outputs])
            )
            assert row["output_error"] == pytest.approx((top / bottom) ** 0.5, rel=1e-5)
        expected = [float((a - b).norm() / b.norm()) for a, b in zip(*states, strict=True)]
        assert result["hidden"] == pytest.approx(expected, rel=1e-5)
        assert not any(reference.get_submodule(name)._forward_hooks for name in rows if name not in changed)
