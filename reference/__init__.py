"""Worked references: what actsteer does on a problem that anyone can rerun."""
