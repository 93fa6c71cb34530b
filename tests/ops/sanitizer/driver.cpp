// Runs the CPU kernels on the shapes read from stdin, one a line: <op> <dtype> <numbers of the op>.
// Built with AddressSanitizer and UndefinedBehaviorSanitizer; FASTSLIM_CPU_ISA chooses the kernels.
// Prints the instruction set and the number of lines checked. `--overread` makes inputs too short.
#include "driver.h"

#include <cstring>
#include <iostream>
#include <sstream>
#include <string>

#include "fastslim/isa.h"

namespace fastslim {
int64_t missing_elements = 0;
}

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "--overread")) fastslim::missing_elements = 1;
  int checked = 0;
  for (std::string text; std::getline(std::cin, text); ++checked) {
    std::istringstream line(text);
    std::string op, dtype;
    line >> op >> dtype;
    if (op == "depthwise_conv2d")
      fastslim::check_depthwise_conv2d(dtype.c_str(), line);
    else if (op == "batch_norm_act")
      fastslim::check_batch_norm_act(dtype.c_str(), line);
    else if (op == "sandwich_loss")
      fastslim::check_sandwich_loss(dtype.c_str(), line);
    else if (op == "slim_conv2d")
      fastslim::check_slim_conv2d(dtype.c_str(), line);
    else
      return std::cerr << "unknown op in: " << text << "\n", 2;
    if (line.fail()) return std::cerr << "too few numbers in: " << text << "\n", 2;
  }
  std::cout << fastslim::isa_name(fastslim::active_isa()) << " " << checked << std::endl;
}
