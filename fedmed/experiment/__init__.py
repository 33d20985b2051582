"""An experiment in simulation: configuration in, run folder out."""
