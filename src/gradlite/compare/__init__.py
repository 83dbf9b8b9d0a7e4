"""Every method on the same work: experiment files → one JSON record a run → tables and figures."""
