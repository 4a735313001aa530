"""What a run of a day or more needs around the method. A reader of the paper may skip all of it."""
