"""What do the flags mean, and which combinations are refused? Records, tables and sentences; no model."""
