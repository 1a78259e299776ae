from node.start_notes import StartNotes


def test_notes_tell_the_time_since_the_start_and_since_the_note_before():
    moments, said = iter([10.0, 12.5, 13.0]), []
    note = StartNotes(lambda: next(moments), lambda *words: said.append(words))

    note("libraries imported")
    note("kernels opened")

    assert said == [("libraries imported", 2.5, 2.5), ("kernels opened", 3.0, 0.5)]
