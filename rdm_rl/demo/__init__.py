"""``rdm-rl demo``: students of the embedded scenes, side by side."""
