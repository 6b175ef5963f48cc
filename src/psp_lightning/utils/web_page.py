"""Recognise the page that a server sends instead of a file."""

from __future__ import annotations


def is_web_page(head: bytes) -> bool:
    """Return whether the first bytes of a file begin an HTML or XML page."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))
