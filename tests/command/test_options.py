"""Options of several numbers can be written in several ways."""

import pytest

from hydravit_command.options import repeat_options


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("m --heads 3,6 --json", "m --heads 3 --heads 6 --json"),
        ("--heads 3 6 12 m d", "--heads 3 --heads 6 --heads 12 m d"),
        ("m --heads=3,6", "m --heads 3 --heads 6"),
        ("m --heads 3 --heads 6", "m --heads 3 --heads 6"),
        ("m --heads 3, 6", "m --heads 3 --heads 6"),
        ("m i --heads 3,12 --thresholds 0.5,inf", "m i --heads 3 --heads 12 --thresholds 0.5 --thresholds inf"),
        ("m --heads x 3", "m --heads x 3"),
        ("m 12 --num-heads 3", "m 12 --num-heads 3"),
    ],
)
def test_an_option_takes_several_numbers(given, spelled):
    assert repeat_options(given.split()) == spelled.split()
