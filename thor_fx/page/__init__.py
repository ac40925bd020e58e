"""A report as one HTML file that needs no network and no other file."""

from .page import Page, write_page

__all__ = ["Page", "write_page"]
