"""What goes in and what comes out: records of benchmarks, and the schema of result rows."""
