"""Warnings of the Hub's client on the screen."""

import logging

import pytest

from hf_ssl.cli.quiet import Seldom


def test_repeated_warnings_pass_once_in_ten_seconds(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    seldom, passed = Seldom(), []
    for now in (100.0, 100.5, 109.0, 110.5):
        for text in (f"HTTP Error 503 for file {now}", f"Retrying in {now:.0f}s"):
            if seldom.filter(logging.makeLogRecord({"msg": text})):
                passed.append(text)
    assert passed == [
        "HTTP Error 503 for file 100.0",
        "Retrying in 100s",
        "HTTP Error 503 for file 110.5",
        "Retrying in 110s",
    ]
