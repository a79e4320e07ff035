#pragma once

// Arguments of native ops as structs of named fields. A struct lists its fields once:
//
//   struct Window : Fields {
//     int64_t height = 0, width = 0;
//     template <class Self, class Visit>
//     static void visit(Self& self, const Visit& field) {
//       field("height", self.height);
//       field("width", self.width);
//     }
//   };
//
// and both the schema's text and how an op reads its arguments come from that list:
//
//   library.def(("attend(Tensor x, " + schema_of<Window>() + ") -> Tensor").c_str());
//   Tensor attend(const Tensor& x, const Window& window);
//   library.impl("attend", boxed<&attend>);
//
// Fields of a field that is itself such a struct have its name before theirs: "window_height". The
// Python side has named tuples of the same names; tests/ops/test_schemas.py compares them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "tensor_checks.h"

namespace moat_kernels {

struct Fields {};

template <class T>
constexpr bool has_fields = std::is_base_of_v<Fields, T>;

template <class T>
constexpr const char* schema_type = nullptr;
// Compilers and exporters may hold sizes open; kernels get numbers.
template <>
inline constexpr const char* schema_type<int64_t> = "SymInt";
template <>
inline constexpr const char* schema_type<double> = "float";
template <>
inline constexpr const char* schema_type<bool> = "bool";
template <>
inline constexpr const char* schema_type<std::string> = "str";
template <>
inline constexpr const char* schema_type<ScalarType> = "ScalarType";
template <>
inline constexpr const char* schema_type<std::optional<Tensor>> = "Tensor?";

struct SchemaWriter {
  std::string& text;
  std::string prefix;

  template <class T>
  void operator()(const char* name, const T& value) const {
    if constexpr (has_fields<T>) {
      T::visit(value, SchemaWriter{text, prefix + name + "_"});
    } else {
      static_assert(schema_type<T> != nullptr);
      text += (text.empty() ? "" : ", ") + std::string(schema_type<T>) + " " + prefix + name;
    }
  }
};

// "Tensor? weight, SymInt height, ..."
template <class T>
std::string schema_of() {
  std::string text;
  const T defaults;
  T::visit(defaults, SchemaWriter{text, ""});
  return text;
}

// Takes an op's arguments from the dispatcher's stack, in order.
struct ArgumentReader {
  StableIValue*& next;

  template <class T>
  void operator()(const char*, T& value) const {
    value = take<T>();
  }

  template <class T>
  T take() const {
    if constexpr (has_fields<T>) {
      T value;
      T::visit(value, *this);
      return value;
    } else if constexpr (std::is_same_v<T, std::string>) {
      return take_string();  // PyTorch's own conversion leaks a copy
    } else {
      return torch::stable::detail::to<T>(*next++);
    }
  }

  std::string take_string() const {
    const auto handle = torch::stable::detail::to<StringHandle>(*next++);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

struct FieldCounter {
  uint64_t& count;

  template <class T>
  void operator()(const char*, const T& value) const {
    if constexpr (has_fields<T>) {
      T::visit(value, *this);
    } else {
      ++count;
    }
  }
};

template <class T>
uint64_t argument_count() {
  if constexpr (has_fields<T>) {
    static const uint64_t known = [] {
      uint64_t count = 0;
      const T defaults;
      T::visit(defaults, FieldCounter{count});
      return count;
    }();
    return known;
  } else {
    return 1;
  }
}

template <class T>
constexpr uint64_t result_count = 1;
template <class... T>
constexpr uint64_t result_count<std::tuple<T...>> = sizeof...(T);

template <class T>
void put_results(StableIValue* stack, const T& result) {
  *stack = torch::stable::detail::from(result);
}

template <class... T>
void put_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { (put_results(stack++, result), ...); }, results);
}

template <class Result, class... Parameters>
void call_boxed(Result (*function)(Parameters...), StableIValue* stack, uint64_t arguments,
                uint64_t results) {
  const uint64_t expected = (argument_count<std::decay_t<Parameters>>() + ...);
  STD_TORCH_CHECK(arguments == expected && results == result_count<Result>, "the schema has ",
                  arguments, " arguments and ", results, " results, the op ", expected, " and ",
                  result_count<Result>);
  StableIValue* next = stack;
  const ArgumentReader reader = {next};
  // Braces: from left to right.
  const std::tuple<std::decay_t<Parameters>...> values{reader.take<std::decay_t<Parameters>>()...};
  put_results(stack, std::apply(function, values));
}

// As TORCH_BOX(function), whose parameters may be structs of fields.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  call_boxed(function, stack, arguments, results);
}

}  // namespace moat_kernels
