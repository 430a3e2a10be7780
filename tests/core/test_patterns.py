import pytest

from barlow.core.patterns import Patterns


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*_mask.png", ["a_mask.png", "d/e/a_mask.png"]),
        ("**/ground_truth/**", ["ground_truth/a.png", "bottle/ground_truth/b/a.png"]),
        ("ground_truth", ["ground_truth/a.png", "bottle/ground_truth/b/a.png"]),
        ("./bottle/", ["bottle/ground_truth/b/a.png"]),
        ("d/*", ["d/e/a_mask.png", "d/x.jpg"]),
        ("d/*.jpg", ["d/x.jpg"]),
        ("d/**/*.png", ["d/e/a_mask.png"]),
        ("d/**", ["d/e/a_mask.png", "d/x.jpg"]),
        ("x.jp?", ["d/x.jpg"]),
        ("[!a]*.jpg", ["d/x.jpg", "ä (1).jpg"]),
        ("[w-y].jpg", ["d/x.jpg"]),
        ("* (1).jpg", ["ä (1).jpg"]),
        ("a.png", ["ground_truth/a.png", "bottle/ground_truth/b/a.png"]),
        ("mask.png", []),
    ],
)
def test_what_a_pattern_matches(pattern, matching):
    paths = [
        "a_mask.png",
        "d/e/a_mask.png",
        "ground_truth/a.png",
        "bottle/ground_truth/b/a.png",
        "d/x.jpg",
        "ä (1).jpg",
    ]
    taken, excluding = Patterns((pattern,), ()), Patterns((), (pattern,))
    assert [path for path in paths if taken.match(path)] == matching
    assert [path for path in paths if not excluding.match(path)] == matching
    left, n = len(paths) - len(matching), len(matching)
    unmatched = [] if n else [f"ingest.include: {pattern} matches no image"]
    assert taken.notes() == [f"left out: {left} by ingest.include", *unmatched]
    assert excluding.notes() == (
        [f"left out: {n} by ingest.exclude"] if n else [f"ingest.exclude: {pattern} matches no image"]
    )


def test_both_together_and_neither():
    both = Patterns(("cats", "dogs"), ("*.gif",))
    assert [path for path in ("cats/a.jpg", "cats/b.gif", "emus/c.jpg", "dogs/x/d.jpg") if both.match(path)] == [
        "cats/a.jpg",
        "dogs/x/d.jpg",
    ]
    assert both.notes() == ["left out: 1 by ingest.include", "left out: 1 by ingest.exclude"]
    neither = Patterns((), ())
    assert neither.match("a.jpg")
    assert neither.notes() == []
