def test_vectors_generated_again_equal_the_committed_files(generator, capsys):
    assert generator.main(["--check"]) == 0, capsys.readouterr().out
