"""Tables, plots and pages made from results; nothing here computes a result."""
