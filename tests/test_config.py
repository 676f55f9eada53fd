"""The configuration: what it accepts, what it refuses, and who wins."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcap import CompilationMode, Config, ConfigError, CUDAGraphMode, environment
from graphcap.config import KINDS

sizes = st.lists(st.integers(1, 4096), max_size=6)
names = st.lists(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), max_size=4)
settings_in_code = st.fixed_dictionaries(
    {},
    optional={
        "compilation_mode": st.sampled_from([*CompilationMode, "none", "Piecewise"]),
        "enforce_eager": st.booleans(),
        "cudagraph_mode": st.sampled_from([*CUDAGraphMode, "full", "AUTO"]),
        "compiler": st.sampled_from(["inductor", "eager"]),
        "splitting_ops": st.none()
        | st.lists(st.sampled_from(["aten::mm", "lab::attention.default", "flash_attn::*", "lab.ops.attend"])),
        "compile_sizes": sizes,
        "capture_sizes": st.none() | sizes,
        "max_capture_size": st.none() | st.integers(1, 9999),
        "capture_after": st.integers(2, 99),
        "static_args": names,
        "max_copy_bytes": st.integers(0, 2**40),
        "disable_passes": names,
        "inductor_compile_config": st.dictionaries(st.sampled_from(["max_autotune", "fx_graph_cache"]), st.booleans()),
        "cache_dir": st.none() | st.just("/some/where"),
    },
)


@given(settings_in_code)
def test_options_round_trip(settings: dict[str, Any]) -> None:
    config = Config.resolve(settings, environ={})
    again = Config.resolve(config.to_dict(), environ={})
    assert again == config
    assert hash(again) == hash(config)
    assert again.describe() == config.describe()
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


@given(settings_in_code, settings_in_code)
def test_equal_exactly_when_every_value_is(left: dict[str, Any], right: dict[str, Any]) -> None:
    a, b = Config(**left), Config(**right)
    assert (a == b) == all(getattr(a, name) == getattr(b, name) for name in KINDS)


@given(settings_in_code)
def test_code_beats_environment_except_for_debugging_switches(settings: dict[str, Any]) -> None:
    environ = {"GRAPHCAP_CAPTURE_AFTER": "7", "GRAPHCAP_COMPILER": "eager"}
    config = Config.resolve(settings, environ=environ)
    assert config.capture_after == settings.get("capture_after", 7)
    assert (config.compiler, config.origin("compiler")) == ("eager", "env GRAPHCAP_COMPILER")


def test_every_setting_is_documented() -> None:
    source = Path(inspect.getfile(Config)).read_text()
    for field in dataclasses.fields(Config):
        assert re.search(rf'^    {field.name}: .*\n    """', source, re.MULTILINE), field.name


def test_origins() -> None:
    environ = {"GRAPHCAP_CACHE_DIR": "/env", "GRAPHCAP_CUDAGRAPH_MODE": "none", "GRAPHCAP_MAX_PLANS": "8"}
    config = Config.resolve({"max_plans": 64, "cudagraph_mode": "full"}, environ=environ)
    assert config.cudagraph_mode is CUDAGraphMode.NONE
    assert config.origin("cudagraph_mode") == "env GRAPHCAP_CUDAGRAPH_MODE"
    assert config.origin("cache_dir") == "env GRAPHCAP_CACHE_DIR"
    assert (config.max_plans, config.origin("max_plans")) == (64, "code"), "a default written out in code is code"
    assert config.origin("simulate") == "default"
    assert [row.name for row in config.describe()] == [field.name for field in dataclasses.fields(Config)]


def test_equality_ignores_where_a_value_came_from() -> None:
    from_code = Config.resolve({"max_plans": 8}, environ={})
    from_environment = Config.resolve(environ={"GRAPHCAP_MAX_PLANS": "8"})
    assert from_code == from_environment == Config(max_plans=8)
    assert len({from_code, from_environment}) == 1


def test_values_are_brought_into_one_form() -> None:
    config = Config(cudagraph_mode="full", capture_sizes=[4, 1, 4], static_args=["kv"])  # type: ignore[arg-type]
    assert config.cudagraph_mode is CUDAGraphMode.FULL
    assert config.capture_sizes == (1, 4)
    assert config.static_args == ("kv",)


def test_a_config_is_taken_as_options() -> None:
    config = Config.resolve(Config(max_plans=3), environ={"GRAPHCAP_CAPTURE_AFTER": "7"})
    assert (config.max_plans, config.capture_after) == (3, 7)
    assert [row.origin for row in config.describe() if row.name in ("max_plans", "capture_after")] == [
        "env GRAPHCAP_CAPTURE_AFTER",
        "code",
    ]


def test_frozen() -> None:
    config = Config(inductor_compile_config={"max_autotune": True})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_plans = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.inductor_compile_config["max_autotune"] = False  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capture_size": [1]}, "did you mean 'capture_sizes'?"),
        ({"max_autotune": True}, "inductor_compile_config"),
        (
            {"cudagraph_mode": "ful"},
            "one of NONE, PIECEWISE, FULL, FULL_DECODE_ONLY, FULL_AND_PIECEWISE, AUTO, got 'ful'; did you mean 'FULL'?",
        ),
        ({"cudagraph_mode": 3}, "cudagraph_mode: expected one of NONE"),
        ({"compiler": "triton"}, "compiler: expected one of inductor, eager, got 'triton'"),
        ({"outputs": "view"}, "outputs: expected 'clone', 'static' or 'ring:N', got 'view'"),
        ({"outputs": "ring:99999999999"}, "outputs: 'ring:N' keeps N copies of every output, N is at most 1024"),
        ({1: 2}, "options: a setting is named by a string, got 1"),
        ([("max_plans", 3)], "options: expected a mapping of settings or a graphcap.Config, got [('max_plans', 3)]"),
        ({"enforce_eager": 1}, "enforce_eager: expected True or False, got 1"),
        ({"max_plans": True}, "max_plans: expected an integer, got True"),
        ({"max_plans": 0}, "max_plans: expected at least 1, got 0"),
        ({"capture_after": 1}, "capture_after: expected at least 2, got 1"),
        ({"capture_sizes": [8, 0]}, "capture_sizes: expected at least 1, got 0"),
        ({"capture_sizes": 8}, "capture_sizes: expected a list or tuple, got 8"),
        ({"static_args": "kv"}, "static_args: expected a list or tuple, got 'kv'"),
        ({"splitting_ops": ["attention"]}, "splitting_ops: expected 'ns::op'"),
        ({"splitting_rules": ["aten::mm"]}, "splitting_rules: expected a function"),
        ({"inductor_compile_config": {1: 2}}, "inductor_compile_config: expected a mapping with string keys"),
        ({"disable_passes": ["a", "b"], "require_passes": ["b"]}, "both name b"),
        ({"compiler": "eager", "require_passes": ["a"]}, "require_passes (a) and compiler='eager'"),
        ({"compilation_mode": "STOCK_TORCH_COMPILE", "require_passes": ["a"]}, "compilation_mode=STOCK_TORCH_COMPILE"),
        ({"capture_sizes": [1], "cudagraph_capture_sizes": [1]}, "'cudagraph_capture_sizes' is another name of"),
    ],
)
def test_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.resolve(settings, environ={})


def test_config_class_refuses_unknown_names_too() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_plans'"):
        Config(max_plan=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="as 'capture_sizes'"):
        Config(cudagraph_capture_sizes=[1])  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="no setting 'max_plan'"):
        Config().origin("max_plan")


def test_aliases() -> None:
    config = Config.resolve({"cudagraph_capture_sizes": [2, 1], "max_cudagraph_capture_size": 8}, environ={})
    assert (config.capture_sizes, config.max_capture_size) == ((1, 2), 8)
    config = Config.resolve(environ={"GRAPHCAP_CUDAGRAPH_CAPTURE_SIZES": "2,1"})
    assert config.origin("capture_sizes") == "env GRAPHCAP_CUDAGRAPH_CAPTURE_SIZES"
    with pytest.raises(ConfigError, match="two names of one setting"):
        Config.resolve(environ={"GRAPHCAP_CUDAGRAPH_CAPTURE_SIZES": "1", "GRAPHCAP_CAPTURE_SIZES": "1"})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("GRAPHCAP_ENFORCE_EAGER", "1", True),
        ("GRAPHCAP_CACHE", "off", False),
        ("GRAPHCAP_COMPILER", "eager", "eager"),
        ("GRAPHCAP_CUDAGRAPH_MODE", "Piecewise", CUDAGraphMode.PIECEWISE),
        ("GRAPHCAP_DISABLE_PASSES", "add_rms_norm, other", ("add_rms_norm", "other")),
        ("GRAPHCAP_DISABLE_PASSES", "none", ()),
        ("GRAPHCAP_DEBUG_DIR", "none", None),
        ("GRAPHCAP_CAPTURE_SIZES", "4,2,1", (1, 2, 4)),
        ("GRAPHCAP_MAX_CAPTURE_SIZE", "none", None),
        ("GRAPHCAP_SPLITTING_OPS", "a::b,c::d.out", ("a::b", "c::d.out")),
        ("GRAPHCAP_MAX_PLANS", "", 64),
        ("GRAPHCAP_VERIFY", "3", 3),
        ("GRAPHCAP_VERIFY", "on", True),
    ],
)
def test_environment_values(variable: str, text: str, value: object) -> None:
    name = variable.removeprefix("GRAPHCAP_").lower()
    assert getattr(Config.resolve(environ={variable: text}), name) == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("GRAPHCAP_CACHE", "maybe", "GRAPHCAP_CACHE: expected one of 1, true, yes, on, 0, false, no, off, got 'maybe'"),
        (
            "GRAPHCAP_CUDAGRAPH_MODE",
            "always",
            "GRAPHCAP_CUDAGRAPH_MODE: expected one of NONE, PIECEWISE, FULL, FULL_DECODE_ONLY,",
        ),
        ("GRAPHCAP_MAX_PLANS", "many", "GRAPHCAP_MAX_PLANS: expected an integer, got 'many'"),
        ("GRAPHCAP_CAPTURE_SIZES", "1;2", "GRAPHCAP_CAPTURE_SIZES: expected an integer, got '1;2'"),
        ("GRAPHCAP_VERIFY", "-1", "GRAPHCAP_VERIFY: expected at least 0, got -1"),
        ("GRAPHCAP_VERIFY", "1.5", "GRAPHCAP_VERIFY: expected a count or one of 1, true, yes, on, 0, false, no, off"),
        ("GRAPHCAP_DIRECT_CALL", "x", "GRAPHCAP_DIRECT_CALL: expected one of 1, true, yes, on, 0, false, no, off"),
        ("GRAPHCAP_COMPILER", "nvcc", "GRAPHCAP_COMPILER: expected one of inductor, eager, got 'nvcc'"),
    ],
)
def test_bad_environment_value_names_variable_and_choices(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.resolve(environ={variable: text})


def test_switching_off_a_required_pass_to_bisect_is_not_an_error() -> None:
    config = Config.resolve({"require_passes": ["a", "b"]}, environ={"GRAPHCAP_DISABLE_PASSES": "a"})
    assert (config.disable_passes, config.require_passes) == (("a",), ("b",))


def test_switching_off_inductor_to_bisect_requires_no_pass() -> None:
    config = Config.resolve({"require_passes": ["a"]}, environ={"GRAPHCAP_COMPILER": "eager"})
    assert (config.compiler, config.require_passes) == ("eager", ())
    assert config.origin("require_passes") == "env GRAPHCAP_COMPILER"
    kept = Config.resolve({"require_passes": ["a"], "compiler": "eager"}, environ={"GRAPHCAP_COMPILER": "inductor"})
    assert kept.require_passes == ("a",)


def test_unknown_variable_warns_once_and_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_warned", set())
    environ = {"GRAPHCAP_CAPTURE_SIZE": "4"}
    with pytest.warns(UserWarning, match=r"GRAPHCAP_CAPTURE_SIZE .* did you mean GRAPHCAP_CAPTURE_SIZES\?"):
        Config.resolve(environ=environ)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.resolve(environ=environ)


@pytest.mark.parametrize("name", ["process_group", "pad", "dynamic_arg_dims"])
def test_a_setting_without_a_form_as_text_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_warned", set())
    variable = f"GRAPHCAP_{name.upper()}"
    with pytest.warns(UserWarning, match=f"{variable}: {name} cannot be set by a variable, only in code"):
        assert Config.resolve(environ={variable: "x"}) == Config()


def test_verify_from_outside_beats_the_code() -> None:
    config = Config.resolve({"verify": False}, environ={"GRAPHCAP_VERIFY": "2"})
    assert (config.verify, config.origin("verify")) == (2, "env GRAPHCAP_VERIFY")


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_modes_that_ask_for_the_defaults(mode: str | None) -> None:
    assert Config.resolve(mode=mode, environ={}) == Config()


def test_autotuning_modes() -> None:
    config = Config.resolve(mode="max-autotune", environ={"GRAPHCAP_CUDAGRAPH_MODE": "full"})
    assert config.inductor_compile_config == {"max_autotune": True, "coordinate_descent_tuning": True}
    assert config.origin("inductor_compile_config") == "mode"
    assert config.cudagraph_mode is CUDAGraphMode.FULL, "a debugging switch beats mode="
    without_graphs = Config.resolve(mode="max-autotune-no-cudagraphs", environ={})
    assert without_graphs.cudagraph_mode is CUDAGraphMode.NONE
    assert without_graphs.inductor_compile_config == config.inductor_compile_config


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="no mode='fast': valid are default, reduce-overhead"):
        Config.resolve(mode="fast", environ={})
    with pytest.raises(ConfigError, match="no mode="):
        Config.resolve(mode=["fast"], environ={})  # type: ignore[arg-type]
