"""Flow records on their way out: log lines, the spool on the disk, uploads to the portal (`docs/flow-logs.md`)."""
