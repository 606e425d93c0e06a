#include "apps/html_report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "common/error.hpp"

#if FIREQ_REPORT
// The assembler puts the files into the program; their ends are labelled too.
#define FIREQ_EMBED(name, path)               \
  __asm__(                                    \
      ".section .rodata\n"                    \
      ".global fireq_asset_" #name            \
      "\n"                                    \
      "fireq_asset_" #name                    \
      ":\n"                                   \
      ".incbin \"" path                       \
      "\"\n"                                  \
      ".global fireq_asset_" #name            \
      "_end\n"                                \
      "fireq_asset_" #name                    \
      "_end:\n"                               \
      ".byte 0\n"                             \
      ".previous\n");                         \
  extern "C" const char fireq_asset_##name[]; \
  extern "C" const char fireq_asset_##name##_end[]

FIREQ_EMBED(page, FIREQ_REPORT_FOLDER "/page.html");
FIREQ_EMBED(css, FIREQ_REPORT_FOLDER "/report.css");
FIREQ_EMBED(script, FIREQ_REPORT_FOLDER "/report.js");
FIREQ_EMBED(plotly, FIREQ_PLOTLY);
#endif

namespace fireq::apps {
namespace {

#if FIREQ_REPORT

// JSON inside <script>: "</" would end the element, "<!--" would change how it is read.
std::string script_json(const nlohmann::json& value) {
  const std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    if (c == '<') {
      out += "\\u003c";
    } else {
      out += c;
    }
  }
  return out;
}

std::string escaped_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// {{name}} by its content; the template's own text is not looked at again.
std::string filled(std::string_view page, const std::map<std::string_view, std::string_view>& content) {
  std::string out;
  std::size_t at = 0;
  for (;;) {
    const std::size_t open = page.find("{{", at);
    if (open == std::string_view::npos) break;
    const std::size_t close = page.find("}}", open);
    out += page.substr(at, open - at);
    out += content.at(page.substr(open + 2, close - open - 2));
    at = close + 2;
  }
  return out.append(page.substr(at));
}

#endif

// Three digits are more than a plot shows, and a third of the bytes. By way of their text, so that the number
// is the one nearest to 0.0123 and is written like that.
nlohmann::json values_json(const std::vector<float>& values, std::size_t step) {
  nlohmann::json list = nlohmann::json::array();
  for (std::size_t i = 0; i < values.size(); i += step) {
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(i);
    const auto end = values.begin() + static_cast<std::ptrdiff_t>(std::min(values.size(), i + step));
    list.push_back(std::stod(fmt::format("{:.3g}", *std::max_element(begin, end))));
  }
  return list;
}

}  // namespace

bool html_report_available() noexcept {
#if FIREQ_REPORT
  return true;
#else
  return false;
#endif
}

nlohmann::json profiles_json(const std::vector<calib::ChannelProfile>& profiles,
                             const std::vector<calib::SmoothedChannels>& smoothed, std::size_t budget) {
  std::size_t total = 0;
  for (const auto& p : profiles) total += 2 * p.absmax.size();
  // The widest sites give way first: a common bound on the points of a profile, halved until all fit.
  std::size_t most = 1;
  for (const auto& p : profiles) most = std::max(most, p.absmax.size());
  const auto step_of = [&](const calib::ChannelProfile& p) { return (p.absmax.size() + most - 1) / most; };
  while (total > budget && most > 1) {
    most = (most + 1) / 2;
    total = 0;
    for (const auto& p : profiles) total += 2 * ((p.absmax.size() + step_of(p) - 1) / step_of(p));
  }
  nlohmann::json sites = nlohmann::json::array();
  for (const auto& p : profiles) {
    if (p.absmax.empty()) continue;
    const std::size_t step = step_of(p);
    sites.push_back({{"layer", p.layer},
                     {"site", p.site},
                     {"step", step},
                     {"channels", p.absmax.size()},
                     {"absmax", values_json(p.absmax, step)},
                     {"rms", values_json(p.rms, step)}});
  }
  nlohmann::json channels = nlohmann::json::array();
  for (const auto& s : smoothed) channels.push_back({{"layer", s.layer}, {"channels", s.channels}});
  return {{"sites", sites}, {"s_channels", channels}};
}

std::string html_report(std::string_view title, const nlohmann::json& document,
                        const nlohmann::json& profiles) {
#if FIREQ_REPORT
  const auto text = [](const char* begin, const char* end) {
    return std::string_view(begin, static_cast<std::size_t>(end - begin));
  };
  const std::string name = escaped_html(title), data = script_json(document),
                    channels = script_json(profiles);
  return filled(text(fireq_asset_page, fireq_asset_page_end),
                {{"title", name},
                 {"css", text(fireq_asset_css, fireq_asset_css_end)},
                 {"data", data},
                 {"profiles", channels},
                 {"plotly", text(fireq_asset_plotly, fireq_asset_plotly_end)},
                 {"script", text(fireq_asset_script, fireq_asset_script_end)}});
#else
  (void)title, (void)document, (void)profiles;
  throw Error(ErrorKind::usage, "this build has no HTML report")
      .hint("run scripts/fetch-assets and configure the build again");
#endif
}

}  // namespace fireq::apps
