"""Colours can be told apart, and from the ground, by everyone."""

import itertools

import numpy as np
import pytest

from fillm.report.theme import MARKERS, STYLES, THEMES

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN_BY = {
    "most": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB under D65."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """WCAG's contrast ratio, 1 to 21."""
    dark, light = sorted(float(linear(colour) @ TO_XYZ[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize("theme", THEMES.values(), ids=lambda theme: theme.name)
def test_no_two_colours_look_alike(theme, eyes):
    seen = {colour: lab(np.array(SEEN_BY[eyes]) @ linear(colour)) for colour in theme.colours}
    assert len(seen) == STYLES
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 10.0, (one, other)


@pytest.mark.parametrize("theme", THEMES.values(), ids=lambda theme: theme.name)
def test_text_and_lines_stand_out(theme):
    assert contrast(theme.ink, theme.ground) > 12.0 and contrast(theme.quiet, theme.ground) > 4.5
    assert min(contrast(colour, theme.ground) for colour in theme.colours) > 2.2
    assert min(contrast(colour, theme.ground) for colour in theme.colours[:4]) > 3.0


def test_a_colour_that_comes_again_has_another_marker():
    theme = THEMES["light"]
    looks = {(theme.colour(style), theme.marker(style)) for style in range(STYLES * len(MARKERS))}
    assert len(looks) == STYLES * len(MARKERS)
