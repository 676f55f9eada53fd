"""Replays looked into: compared with live runs, timed, named, and weighed against running live."""
