# Two directions of the network two_sides of given.py, in one file. The last line is to show both.
set -e
actsteer fit -m given:two_sides --positive right.pt --negative left.pt --sites relu -o parts/right.safetensors
actsteer fit -m given:twelve_kinds --positive up.pt --negative down.pt --sites 1 -o parts/up.safetensors
actsteer convert parts/right.safetensors parts/up.safetensors bank.safetensors
actsteer show bank.safetensors
