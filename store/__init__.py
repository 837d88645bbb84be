"""Files and folders that are whole or not there at all. Knows no database, no jobs, no network."""
