"""Lists as authors state them become sigmas of a MODEL, or a sentence that says what is wrong."""

import pytest

from fewstep.comfy_nodes.sigma_lists import (
    AS_LISTED,
    FIRST_TRAINED,
    KINDS,
    SIGMAS,
    TERMINALS,
    TIMESTEPS,
    UNSHIFTED,
    ZERO,
    find_run,
    listed_sigmas,
    parse_numbers,
    sigma_table,
)
from fewstep.errors import ConfigError
from tests.comfy_pack.stand_ins import FlowSampling, TableSampling

TABLE, FLOW = TableSampling(), FlowSampling(shift=5.0)


def listed(
    text: str,
    sampling: object = FLOW,
    *,
    kind: str = TIMESTEPS,
    shift: float = 0.0,
    terminal: str = ZERO,
) -> list[float]:
    """The node's defaults."""
    return list(listed_sigmas(text, sampling, kind=kind, shift=shift, terminal=terminal))


@pytest.mark.parametrize(
    "text", ["999, 749.5,4", "[999, 749.5, 4]", "999 749.5\n4", "(999; 749.5; 4,)"]
)
def test_numbers_are_found_however_they_are_written(text: str) -> None:
    assert parse_numbers(text) == (999.0, 749.5, 4.0)


@pytest.mark.parametrize("text", ["", " ,; "])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="The list is empty; write numbers"):
        parse_numbers(text)


def test_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="'t999' is not a number"):
        parse_numbers("t999, 749")


def test_timesteps_of_a_table_are_looked_up() -> None:
    expected = [*(float(TABLE.sigmas[t]) for t in (999, 749, 499, 249)), 0.0]
    assert listed("999, 749, 499, 249", TABLE) == pytest.approx(expected, rel=1e-6)


def test_timesteps_of_a_flow_are_not_shifted_again() -> None:
    assert listed("1000, 937.5, 833.3, 625") == pytest.approx([1.0, 0.9375, 0.8333, 0.625, 0.0])


def test_a_zero_in_the_list_is_its_end() -> None:
    assert listed("1000, 625, 0") == [1.0, 0.625, 0.0]
    assert listed("999, 499, 0", TABLE)[-1] == 0.0
    assert len(listed("999, 499, 0", TABLE)) == 3
    assert listed("0.9, 0.5, 0", kind=SIGMAS) == [0.9, 0.5, 0.0]


def test_the_first_training_step_is_the_models_least_noise() -> None:
    least = float(TABLE.sigmas[0])
    assert listed("999, 499", TABLE, terminal=FIRST_TRAINED)[-1] == pytest.approx(least)
    assert listed("999, 499, 0", TABLE, terminal=FIRST_TRAINED)[-1] == pytest.approx(least)
    assert listed("1000, 500", terminal=FIRST_TRAINED)[-1] == float(FLOW.sigma_min)


def test_unshifted_sigmas_are_shifted_once() -> None:
    given = "1, 0.75, 0.5, 0.25"
    expected = [1.0, 0.9375, 5.0 / 6.0, 0.625, 0.0]
    assert listed(given, kind=UNSHIFTED) == pytest.approx(expected)  # the model's own
    assert listed(given, FlowSampling(), kind=UNSHIFTED, shift=5.0) == pytest.approx(expected)


def test_only_flow_models_are_shifted() -> None:
    with pytest.raises(ConfigError, match='is no flow model.* set kind to "timesteps"'):
        listed("1, 0.5", TABLE, kind=UNSHIFTED)


def test_sigmas_must_fall() -> None:
    with pytest.raises(
        ConfigError, match=r"Sigmas must fall: 0\.75 is followed by 0\.8 \(entry 3\)\."
    ):
        listed("1, 0.75, 0.8", kind=SIGMAS)


def test_a_list_must_end_near_clean_data() -> None:
    with pytest.raises(ConfigError, match=r"ends at 0\.625; add 0 or choose a terminal\."):
        listed("1000, 937.5, 833.3, 625", terminal=AS_LISTED)
    assert listed("1, 0.5, 0.02", kind=SIGMAS, terminal=AS_LISTED)[-1] == 0.02


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1001, 500", TIMESTEPS, r"Timestep 1001 \(entry 1\) is not between 0 and 1000"),
        ("1000, -1", TIMESTEPS, r"Timestep -1 \(entry 2\)"),
        ("14.6, 1", SIGMAS, r"Sigma 14\.6 \(entry 1\) is not between 0 and 1"),
        ("999, 500", UNSHIFTED, r"Unshifted sigma 999 \(entry 1\)"),
        ("nan, 500", TIMESTEPS, r"Timestep nan"),
    ],
)
def test_numbers_of_another_kind_are_noticed(text: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(text, kind=kind)


def test_a_split_is_a_run_of_the_whole() -> None:
    whole = [14.6, 4.1, 1.6, 0.7, 0.0]
    assert find_run(whole, whole) == 0
    assert find_run(whole, [4.1, 1.6]) == 1
    assert find_run(whole, [0.7 * (1 + 5e-5), 0.0]) == 3
    assert find_run(whole, [4.1, 0.7]) is None
    assert find_run(whole, [0.7, 0.0, 0.0]) is None
    assert find_run(whole, [*whole, 0.0]) is None


def test_the_table_shows_what_the_network_is_told() -> None:
    lines = sigma_table(listed("999, 499", TABLE), TABLE).splitlines()
    assert lines[0].split() == ["step", "timestep", "sigma"]
    assert lines[1].split() == ["1", "999.0", f"{float(TABLE.sigmas[999]):.4f}"]
    assert lines[-1].split() == ["end", "0.0000"]


def test_choices_are_what_nodes_offer() -> None:
    assert KINDS == ("timesteps", "sigmas", "unshifted + shift")
    assert TERMINALS == ("zero", "first training step", "as listed")
