"""The recipe that joins the stages, and what it can be told. Import its modules by name."""
