"""The normalization graph against closed forms, and at the ends of what a float32 can be."""

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from components.normalization.graph import CLAMP, NormalizationGraph
from components.normalization.spec import FeatureNormalization, NormalizationSpec

NAN, INF = math.nan, math.inf


def feature(name: str, type_: str, **parameters: object) -> FeatureNormalization:
    return FeatureNormalization.model_validate(
        {"name": name, "type": type_, "how": "by hand", "evidence": {}, **parameters}
    )


BINARY = feature("binary", "binary")
PROBABILITY = feature("probability", "probability", mean=-1.0, stddev=2.0)
CONTINUOUS = feature("continuous", "continuous", mean=3.0, stddev=0.5)
BOX_COX = feature("box_cox", "box_cox", mean=1.0, stddev=2.0, box_cox_lambda=0.5, box_cox_shift=2.0)
LOG = feature("log", "box_cox", mean=1.0, stddev=2.0, box_cox_lambda=0.0, box_cox_shift=0.5)
INVERSE = feature("inverse", "box_cox", mean=0.2, stddev=0.1, box_cox_lambda=-2.0, box_cox_shift=1.0)
QUANTILE = feature("quantile", "quantile", quantiles=[-4.0, 0.0, 1.0, 10.0])
COARSE = feature("coarse", "quantile", quantiles=[0.0, 2.0])
ENUM = feature("enum", "enum", values=[-2.0, 0.0, 7.0])
SHORT_ENUM = feature("short_enum", "enum", values=[1.0, 2.0])
ALL = [BINARY, PROBABILITY, CONTINUOUS, BOX_COX, LOG, INVERSE, QUANTILE, COARSE, ENUM, SHORT_ENUM]
WILD = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e30, -1e30, 3.4e38, -3.4e38]


def graph_of(*features: FeatureNormalization, inputs: list[str] | None = None) -> NormalizationGraph:
    return NormalizationGraph(NormalizationSpec(inputs=inputs or [f.name for f in features], features=list(features)))


def normalize(one: FeatureNormalization, values: list[float]) -> np.ndarray:
    """The outputs of a graph of this feature alone; a single output's axis is dropped."""
    result = graph_of(one)(torch.tensor(values, dtype=torch.float32)[:, None]).numpy()
    return result[:, 0] if result.shape[1] == 1 else result


def clamped(values: list[float]) -> np.ndarray:
    return np.clip(values, -CLAMP, CLAMP)


def test_binary_is_whether_a_value_is_not_zero() -> None:
    found = normalize(BINARY, [0, -0.0, 1, -3, 1e-45, INF, -INF, NAN])
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 1, 1, 1, 0])


def test_probability_is_the_standardized_logit() -> None:
    values = [0.01, 0.3, 0.5, 0.99]
    wanted = [(math.log(p / (1 - p)) + 1) / 2 for p in values]
    np.testing.assert_allclose(normalize(PROBABILITY, values), wanted, rtol=1e-5)


def test_probability_outside_its_range_is_at_its_ends() -> None:
    low, high = ((math.log(p / (1 - p)) + 1) / 2 for p in (1e-5, 1 - 1e-5))
    found = normalize(PROBABILITY, [0, -1, -INF, -0.0, 1, 2, INF])
    np.testing.assert_allclose(found, clamped([low] * 4 + [high] * 3), rtol=1e-3)


def test_continuous_is_standardized_and_clamped() -> None:
    found = normalize(CONTINUOUS, [3, 3.5, 2, 5.999, 100, 1e30, -1e30, INF, -INF, NAN])
    np.testing.assert_allclose(found, [0, 1, -2, 5.998, 6, 6, -6, 6, -6, 0], rtol=1e-6)


def test_a_continuous_feature_without_spread_is_only_shifted() -> None:
    assert normalize(feature("x", "continuous", mean=1.0, stddev=0.0), [3.0]).tolist() == [2.0]


def test_box_cox_is_its_standardized_transform() -> None:
    values = [-1.0, 0.0, 2.0, 7.0]
    root = [(2 * (math.sqrt(v + 2) - 1) - 1) / 2 for v in values]
    np.testing.assert_allclose(normalize(BOX_COX, values), root, rtol=1e-5)
    positive = [0.1, 1.0, 30.0]
    np.testing.assert_allclose(normalize(LOG, positive), [(math.log(v + 0.5) - 1) / 2 for v in positive], rtol=1e-5)
    inverse = [((v + 1) ** -2 - 1) / -2 for v in positive]
    np.testing.assert_allclose(normalize(INVERSE, positive), [(y - 0.2) / 0.1 for y in inverse], rtol=1e-4)


@pytest.mark.parametrize("one", [BOX_COX, LOG, INVERSE], ids=lambda f: f.name)
def test_box_cox_under_its_range_is_at_its_lowest(one: FeatureNormalization) -> None:
    found = normalize(one, [-one.box_cox_shift, -one.box_cox_shift - 5, -1e30, -INF])
    assert (found == found[0]).all()
    assert found[0] < normalize(one, [1.0])[0]


def test_box_cox_near_the_logarithm_is_close_to_it() -> None:
    near = LOG.model_copy(update={"box_cox_lambda": 1e-4})
    values = [0.1, 1.0, 30.0]
    np.testing.assert_allclose(normalize(near, values), normalize(LOG, values), atol=1e-3)


def test_quantile_is_the_place_among_the_quantiles() -> None:
    found = normalize(QUANTILE, [-4, -2, 0, 0.5, 1, 5.5, 10])
    np.testing.assert_allclose(found, [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1], atol=1e-6)


def test_quantile_outside_its_range_is_at_its_ends() -> None:
    np.testing.assert_array_equal(normalize(QUANTILE, [-5, -1e30, -INF, 11, 1e30, INF]), [-1, -1, -1, 1, 1, 1])


def test_quantiles_as_far_apart_as_floats_are_and_as_near_stay_in_order() -> None:
    wide, narrow = (feature("q", "quantile", quantiles=q) for q in ([-3e38, 3e38], [0.0, 1e-38, 2e-38]))
    assert normalize(wide, [-3e38, 0.0, 3e38, INF]) == pytest.approx([-1.0, 0.0, 1.0, 1.0])
    assert normalize(narrow, [0.0, 5e-39, 1e-38, 2e-38]) == pytest.approx([-1.0, -0.5, 0.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("one", [f for f in ALL if f.type not in ("binary", "enum")], ids=lambda f: f.name)
def test_zero_has_no_sign_and_a_denormal_is_as_good_as_it(one: FeatureNormalization) -> None:
    zero, negative, *denormal = normalize(one, [0.0, -0.0, 1e-45, -1e-45])
    assert zero == negative
    assert denormal == pytest.approx([zero, zero], abs=1e-6)


@pytest.mark.parametrize(
    ("one", "highest"),
    [
        (BOX_COX, (math.expm1(0.5 * math.log(3e38 + 2)) / 0.5 - 1) / 2),
        (LOG, (math.log(3e38) - 1) / 2),
        (INVERSE, (0.5 - 0.2) / 0.1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_box_cox_of_infinity_is_that_of_the_largest_number(one: FeatureNormalization, highest: float) -> None:
    assert normalize(one, [3e38, INF]) == pytest.approx(np.repeat(clamped([highest]), 2), rel=1e-5)


def test_a_probability_is_clamped_where_its_spec_says() -> None:
    found = normalize(PROBABILITY.model_copy(update={"probability_clamp": 0.1}), [0.0, 0.1, 0.5, 1.0])
    logits = np.log([0.1 / 0.9, 0.1 / 0.9, 1.0, 0.9 / 0.1])
    assert found == pytest.approx((logits + 1) / 2, rel=1e-5)


def test_lists_of_quantiles_of_different_length_do_not_mix() -> None:
    graph = graph_of(QUANTILE, COARSE)
    found = graph(torch.tensor([[5.5, 0.5], [1.0, 2.0], [-9.0, 1e30]])).numpy()
    np.testing.assert_allclose(found, [[2 / 3, -0.5], [1 / 3, 1], [-1, 1]], atol=1e-6)


def test_enum_is_one_hot_and_an_unseen_value_is_other() -> None:
    found = normalize(ENUM, [-2, 0, -0.0, 7, 1, 1e-45, INF, -INF, NAN])
    first, second, third, other = np.eye(4)
    np.testing.assert_array_equal(found, [first, second, second, third, other, other, other, other, np.zeros(4)])


def test_enums_of_different_size_do_not_mix() -> None:
    graph = graph_of(ENUM, SHORT_ENUM)
    assert graph.outputs == 7
    found = graph(torch.tensor([[0.0, 2.0], [NAN, 1.0], [7.0, NAN], [9.0, 9.0]])).numpy()
    np.testing.assert_array_equal(
        found, [[0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1]]
    )


def test_a_presence_bit_tells_whether_a_feature_is_there() -> None:
    spec = NormalizationSpec(
        inputs=["enum", "binary", "continuous"], features=[BINARY, CONTINUOUS, ENUM], presence=["continuous", "enum"]
    )
    graph = NormalizationGraph(spec)
    assert graph.output_features == ["binary", "continuous", *["enum"] * 4, "continuous", "enum"]
    found = graph(torch.tensor([[7.0, 1.0, 3.0], [NAN, 1.0, 3.0], [7.0, NAN, NAN], [7.0, 0.0, INF]])).numpy()
    assert found.shape == (4, graph.outputs)
    np.testing.assert_array_equal(found[:, -2:], [[1, 1], [1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize("presence", [[], [one.name for one in ALL]])
def test_the_graph_exports_to_onnx_as_it_is(presence: list[str], tmp_path: Path) -> None:
    """One graph in torch and in onnxruntime, on ordinary rows and at the ends of what a float32 can be."""
    graph = NormalizationGraph(
        NormalizationSpec(inputs=[one.name for one in ALL], features=ALL, presence=presence)
    ).eval()
    rows = np.random.default_rng(0).normal(1, 3, (200, len(ALL))).astype(np.float32)
    rows[::7, ::3] = np.nan
    rows = np.concatenate([rows.round(0), rows, np.repeat(np.array(WILD, np.float32)[:, None], len(ALL), 1)])
    program = torch.onnx.export(
        graph, (torch.zeros(2, len(ALL)),), dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False
    )
    program.save(str(tmp_path / "graph.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: rows})
    np.testing.assert_allclose(found, graph(torch.from_numpy(rows)).numpy(), atol=1e-5)


@pytest.mark.parametrize("one", ALL, ids=lambda f: f.name)
def test_a_missing_value_is_zero(one: FeatureNormalization) -> None:
    assert not np.any(normalize(one, [NAN]))
    assert np.any(normalize(one, [2.0, 7.0, 0.5]))


def test_a_missing_value_touches_no_other_feature() -> None:
    graph = graph_of(*ALL)
    whole = torch.full((1, len(ALL)), 2.0)
    for i, one in enumerate(ALL):
        holed = whole.clone()
        holed[0, i] = NAN
        changed = int((graph(whole) != graph(holed)).sum())
        assert changed <= graph_of(one).outputs


def test_each_feature_keeps_its_own_columns_whatever_its_neighbours() -> None:
    """Types are handled together, in the order of their names; within a type the input's order is kept."""
    mixed = [ENUM, CONTINUOUS, QUANTILE, BINARY, BOX_COX, SHORT_ENUM, PROBABILITY, LOG, COARSE]
    rows = torch.tensor(np.random.default_rng(0).normal(1, 2, (50, len(mixed))).round(1).astype(np.float32))
    rows[:5, 2] = NAN
    together = graph_of(*mixed)(rows).numpy()
    order = sorted(range(len(mixed)), key=lambda i: mixed[i].type)
    alone = [graph_of(mixed[i])(rows[:, i : i + 1]).numpy() for i in order]
    np.testing.assert_allclose(together, np.concatenate(alone, 1), rtol=1e-6)


def test_inputs_without_a_feature_are_ignored() -> None:
    graph = graph_of(CONTINUOUS, BINARY, inputs=["constant", "binary", "never", "continuous"])
    rows = torch.tensor([[1.0, 1.0, NAN, 3.5], [INF, 1.0, -1e30, 3.5]])
    np.testing.assert_array_equal(graph(rows).numpy(), [[1, 1], [1, 1]])
    assert graph.outputs == 2


def test_rows_do_not_depend_on_one_another() -> None:
    graph = graph_of(*ALL)
    rows = torch.tensor(np.random.default_rng(1).normal(1, 3, (64, len(ALL))).astype(np.float32))
    one_by_one = torch.cat([graph(row[None]) for row in rows])
    np.testing.assert_array_equal(graph(rows).numpy(), one_by_one.numpy())


@pytest.mark.parametrize("value", WILD)
def test_wild_values_give_finite_outputs_of_the_declared_width(value: float) -> None:
    graph = graph_of(*ALL)
    found = graph(torch.full((2, len(ALL)), value)).numpy()
    assert found.shape == (2, graph.outputs)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= CLAMP


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@seed(0)
@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(floats, min_size=len(ALL), max_size=len(ALL)))
def test_outputs_are_finite_for_any_float(values: list[float]) -> None:
    found = graph_of(*ALL)(torch.tensor([values], dtype=torch.float32)).numpy()
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= CLAMP


@seed(0)
@settings(max_examples=150, deadline=None, database=None)
@given(
    value=floats,
    lam=st.floats(-2, 2),
    shift=st.floats(-1e30, 1e30),
    mean=st.floats(-3e38, 3e38),
    stddev=st.floats(0, 3e38),
    start=st.floats(-1e6, 1e6),
    steps=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20),
)
def test_outputs_are_finite_whatever_the_parameters(
    value: float, lam: float, shift: float, mean: float, stddev: float, start: float, steps: list[float]
) -> None:
    graph = graph_of(
        feature("a", "box_cox", box_cox_lambda=lam, box_cox_shift=shift, mean=mean, stddev=stddev),
        feature("b", "continuous", mean=mean, stddev=stddev),
        feature("c", "quantile", quantiles=[start, *(start + np.cumsum(steps)).tolist()]),
    )
    assert np.isfinite(graph(torch.full((1, 3), value)).numpy()).all()


finite = st.floats(width=32, allow_nan=False, allow_infinity=True)


@pytest.mark.parametrize(
    "one", [BOX_COX, LOG, INVERSE, QUANTILE, COARSE, CONTINUOUS, PROBABILITY], ids=lambda f: f.name
)
def test_normalization_is_monotone(one: FeatureNormalization) -> None:
    graph = graph_of(one)

    @seed(0)
    @settings(max_examples=100, deadline=None, database=None)
    @given(st.lists(finite | st.floats(-20, 20, width=32), min_size=2, max_size=20))
    def check(values: list[float]) -> None:
        found = graph(torch.tensor(sorted(values), dtype=torch.float32)[:, None]).numpy()[:, 0]
        assert (np.diff(found) >= -1e-6).all()

    check()
    assert np.ptp(graph(torch.linspace(-5, 5, 20)[:, None]).numpy()) > 0
