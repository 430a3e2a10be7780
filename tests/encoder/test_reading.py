import threading

from barlow.encoder import reading


def test_files_are_read_ahead_in_order_and_only_a_few(monkeypatch):
    started, drawn = threading.Event(), []

    def slow_first(path):
        if path == "0":
            started.wait(5)  # until a later file was begun
        else:
            started.set()
        return path

    monkeypatch.setattr(reading, "_read", slow_first)
    ahead = reading.read_ahead((drawn.append(i) or str(i) for i in range(100)), threads=2)
    assert next(ahead) == ("0", "0")
    assert len(drawn) <= 6
    assert [path for path, _ in ahead] == [str(i) for i in range(1, 100)]
