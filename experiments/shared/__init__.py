"""What the binaries share: flags, records, rows, tables, figures."""
