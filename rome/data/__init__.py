"""Input and output: records of benchmarks, and the schema of result rows."""
