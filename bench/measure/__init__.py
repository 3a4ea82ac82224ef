"""What measures: clocks, rates of the machine, attributed time, memory, and a run of many cases."""
