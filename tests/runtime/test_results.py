"""What results say of the code that made them."""

import subprocess

import pytest

from ddpm_from_scratch.runtime import results


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, which also has a tag, in the place of this project's."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one", encoding="utf-8")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "one")
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    results.commit.cache_clear()
    yield tmp_path
    results.commit.cache_clear()


def test_the_commit_of_a_checkout_and_whether_files_differ_from_it(checkout):
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert results.commit() == head
    results.commit.cache_clear()
    (checkout / "file").write_text("two", encoding="utf-8")
    assert results.commit() == f"{head}-dirty"


def test_a_package_within_another_repository_has_no_commit(checkout, monkeypatch):
    monkeypatch.setattr(results, "CHECKOUT", checkout / "venv" / "lib")
    (checkout / "venv" / "lib").mkdir(parents=True)
    assert results.commit() is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.commit() is None


def test_the_address_of_the_code_is_what_the_package_says(monkeypatch, tmp_path):
    info = tmp_path / "somewhere-1.0.dist-info"
    info.mkdir()
    lines = (
        "Metadata-Version: 2.4",
        "Name: somewhere",
        "Version: 1.0",
        "Project-URL: Repository, https://example.org/a",
    )
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for package, expected in (("somewhere", "https://example.org/a"), ("numpy-of-nobody", None)):
        monkeypatch.setattr(results, "PACKAGES", (package,))
        assert results.code_address() == expected
