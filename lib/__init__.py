"""What Whorl's jobs and applications share. Imports neither `jobs` nor `serve`."""
