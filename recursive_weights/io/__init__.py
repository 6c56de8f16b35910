"""Files of other programs, read and written without pickle."""
