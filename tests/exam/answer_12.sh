set -e
actsteer fit -m given:two_sides --positive right.pt --negative left.pt --sites 1 -o parts/right.safetensors
actsteer fit -m given:two_sides --positive up.pt --negative down.pt --sites 1 -o parts/up.safetensors
actsteer convert 'parts/*.safetensors' bank.safetensors
actsteer show bank.safetensors
